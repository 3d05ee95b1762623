//! Passes rows from their files to the tokenising encoder in batches. Layer 6.
//!
//! Invariant: the examples do not depend on the batch boundaries.

use std::fmt::Display;

use super::read::{RowBatch, TakeRows};
use super::row::{Row, RowPlace};
use super::split::Split;
use super::store::TokenStore;
use crate::error::Result;

/// The source of a run's rows.
pub trait RowFeed {
    /// Passes the rows of a split to `take`, in order. Called once for each split.
    fn each(&self, split: Split, take: &mut TakeRows) -> Result<()>;

    /// Creates a store for the tokens of a split.
    fn store(&self) -> TokenStore {
        TokenStore::default()
    }
}

/// Rows in memory.
pub struct HeldRows<'a> {
    pub train: &'a [Row],
    pub eval: &'a [Row],
}

impl RowFeed for HeldRows<'_> {
    fn each(&self, split: Split, take: &mut TakeRows) -> Result<()> {
        let rows = match split {
            Split::Train => self.train,
            Split::Eval => self.eval,
        };
        let mut batch = RowBatch::default();
        for row in rows {
            batch.push(row.clone());
            if batch.is_full() {
                batch.hand_on(take)?;
            }
        }
        batch.hand_on(take)
    }
}

/// Turns rows into examples, in order. It may hold examples back until it has seen more rows.
pub trait RowEncoder {
    type Example;
    /// Counts of kept, truncated and dropped rows; `Display` is the summary that a run prints.
    type Stats: Display;

    /// Encodes the next rows. Appends the examples that are ready, each with the place of its row.
    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<Self::Example>) -> Result<()>;

    /// Ends the input and appends the examples held back. Error: there is nothing to train on.
    fn finish(self, examples: &mut Encoded<Self::Example>) -> Result<Self::Stats>;
}

/// Examples, each with the place of its row.
pub type Encoded<E> = Vec<(RowPlace, E)>;

/// Encodes all of `rows` at once.
pub fn encode_all<R: RowEncoder>(
    mut encoder: R,
    rows: &[Row],
) -> Result<(Vec<R::Example>, R::Stats)> {
    let mut examples = Vec::with_capacity(rows.len());
    encoder.encode(rows, &mut examples)?;
    let stats = encoder.finish(&mut examples)?;
    Ok((examples.into_iter().map(|(_, example)| example).collect(), stats))
}
