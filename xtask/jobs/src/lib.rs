//! The services for a long job: child processes, Ctrl-C, the screen, and the durations of earlier runs.

mod background;
pub mod child;
pub mod history;
mod interrupt;
mod lines;
mod ui;

pub use background::Background;
pub use ui::{Step, Ui};
