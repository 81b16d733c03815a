//! What a long job needs of this process: children, Ctrl-C, the screen, and the times of earlier runs.

pub mod child;
pub mod history;
pub mod interrupt;
pub mod screen;
pub mod usual;
