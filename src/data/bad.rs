//! Rows that cannot be used: an error, or counted and left out. Layer 6.
//!
//! Invariant: only errors that name a line of a file are a row's; every other error ends the run.

use std::fmt;

pub use crate::config::OnBadRow;
use crate::error::{Error, Result};

/// The rows that were left out so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BadRows {
    on_bad_row: OnBadRow,
    pub count: usize,
    /// The first three, with file, line and reason.
    pub named: Vec<String>,
}

/// Bad rows that are named.
const NAMED: usize = 3;

impl BadRows {
    pub fn new(on_bad_row: OnBadRow) -> BadRows {
        BadRows { on_bad_row, ..BadRows::default() }
    }

    /// What was made of a row; None if the row is bad and may be dropped.
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

    /// Those of `all` that are good, with what was made of them.
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

    /// Ends a paragraph about the rows: a list, behind which no sentence follows.
    pub fn write_last(&self, f: &mut fmt::Formatter) -> fmt::Result {
        if self.count > 0 { write!(f, " {self}") } else { Ok(()) }
    }

    /// An error if all rows are bad.
    pub fn some_left(&self, rows: usize) -> Result<()> {
        match self.named.first() {
            Some(first) if rows == 0 => Err(Error::Run(format!(
                "all {} rows are bad, so none is left; the first: {first}",
                self.count
            ))),
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
