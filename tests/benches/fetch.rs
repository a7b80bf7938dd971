//! Images fetched a second and core from a server on loopback.
fn main() {}
