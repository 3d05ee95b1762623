//! Bad rows: an error, or counted and dropped. Layer 6.
//!
//! Invariant: only an error that names a line of a file belongs to a row; every other error ends
//! the run.

use std::fmt;

pub use crate::config::OnBadRow;
use crate::error::{Error, Result};

/// The bad rows dropped so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadRows {
    on_bad_row: OnBadRow,
    pub count: usize,
    /// Messages of the first three: file, line and reason.
    pub named: Vec<String>,
}

/// Number of bad rows whose messages are kept.
const NAMED: usize = 3;

impl BadRows {
    pub fn new(on_bad_row: OnBadRow) -> BadRows {
        BadRows { on_bad_row, ..BadRows::default() }
    }

    /// Returns the value made from a row; None if the row is bad and may be dropped.
    pub fn admit<T>(&mut self, made: Result<T>) -> Result<Option<T>> {
        match made {
            Ok(made) => Ok(Some(made)),
            Err(error @ Error::Data { line: Some(_), .. }) if self.on_bad_row == OnBadRow::Drop => {
                self.count += 1;
                if self.named.len() < NAMED {
                    self.named.push(error.to_string());
                }
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }

    /// Returns the good rows of `all`, each with the value that `make` returned.
    pub fn filter<'a, R, T>(
        &mut self,
        all: &'a [R],
        make: impl Fn(&'a R) -> Result<T>,
    ) -> Result<Vec<(&'a R, T)>> {
        let mut good = Vec::with_capacity(all.len());
        for row in all {
            if let Some(made) = self.admit(make(row))? {
                good.push((row, made));
            }
        }
        self.some_left(good.len())?;
        Ok(good)
    }

    /// Writes the bad rows at the end of a summary: they are a list, after which no sentence can
    /// follow.
    pub fn write_last(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.count > 0 { write!(f, " {self}") } else { Ok(()) }
    }

    /// Returns an error if all rows are bad.
    pub fn some_left(&self, rows: usize) -> Result<()> {
        match self.named.first() {
            Some(first) if rows == 0 => {
                Err(Error::Run(format!("all {} rows are bad; the first: {first}", self.count)))
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for BadRows {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let rows = if self.count == 1 { "row" } else { "rows" };
        write!(f, "{} bad {rows} dropped (on_bad_row=drop):", self.count)?;
        self.named.iter().try_for_each(|row| write!(f, "\n  {row}"))?;
        match self.count - self.named.len() {
            0 => Ok(()),
            more => write!(f, "\n  and {more} more"),
        }
    }
}
