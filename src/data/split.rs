//! The training or evaluation split. Layer 6.
//!
//! Invariant: every row of a run belongs to one of the two.

/// A split of the rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    Train,
    Eval,
}
