//! The program of `cargo xtask bench try`, which prints a line at once.

fn main() {
    println!("here");
}
