//! Rows rebuilt a second: join, deduplication and filter of a build over samples, captions and scores.
fn main() {}
