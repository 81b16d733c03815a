//! What a long job needs of this process: children, Ctrl-C, the screen, and the times of earlier runs.

mod background;
pub mod child;
pub mod history;
mod interrupt;
mod ui;

pub use background::Background;
pub use ui::{Step, Ui};
