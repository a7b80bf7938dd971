//! The system as its user sees it.
