//! The services for a long job: child processes, Ctrl-C, the screen, the durations of earlier runs, and this host's
//! package mirrors.

mod background;
pub mod child;
pub mod history;
mod interrupt;
mod lines;
pub mod mirror;
mod ui;

pub use background::Background;
pub use ui::{Step, Ui};
