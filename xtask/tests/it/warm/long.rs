//! Tests that take several boots.

mod agree;
mod installer;
mod instance;
