//! Training rows or evaluation rows. Layer 6.
//!
//! Invariant: every row of a run is of one of the two.

/// Which rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Eval,
}
