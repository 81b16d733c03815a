//! What a long job needs of this process: children, Ctrl-C, the screen, and the times of earlier runs.

pub mod child;
pub mod history;
mod interrupt;
mod screen;
mod ui;
pub mod usual;

pub use ui::{Background, Step, Ui};
