//! Passes rows from their files to the tokenising encoder, a batch at a time. Layer 6.
//!
//! Invariant: the examples do not depend on where a batch ends.

use std::fmt::Display;

use super::read::{RowBatch, TakeRows};
use super::row::{Row, RowPlace};
use super::split::Split;
use super::store::TokenStore;
use crate::error::Result;

/// Where the rows of a run come from.
pub trait RowFeed {
    /// Passes the rows of a split to `take`, in order. Called once for each split.
    fn each(&self, split: Split, take: &mut TakeRows) -> Result<()>;

    /// A new store for the tokens of a split.
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

/// Turns rows into examples, in order. It may hold some back until it has seen more rows.
pub trait RowEncoder {
    type Example;
    /// Counts of kept, cut and dropped rows; `Display` is the summary that a run prints.
    type Stats: Display;

    /// Takes the next rows. Adds the examples that are ready, each with the place of its row.
    fn encode(&mut self, rows: &[Row], examples: &mut Encoded<Self::Example>) -> Result<()>;

    /// Ends the rows and adds the examples that were held back. Error: nothing is left to train on.
    fn finish(self, examples: &mut Encoded<Self::Example>) -> Result<Self::Stats>;
}

/// Examples with their places.
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
