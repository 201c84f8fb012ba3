//! The soccr command.
fn main() {}
