//! The shape of a tensor, stored inline, so that cloning a tensor allocates nothing. Layer 1.
//!
//! Invariant: at most [`Dims::MOST`] dimensions.

use std::fmt;
use std::ops::{Deref, DerefMut};

use crate::error::{Error, Result};

/// The dimensions of a tensor; dereferences to a slice.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Dims {
    count: u8,
    sizes: [usize; Dims::MOST],
}

impl Dims {
    pub const MOST: usize = 4;

    /// Error: `shape` has more than [`Dims::MOST`] dimensions.
    pub fn of(shape: &[usize]) -> Result<Dims> {
        let mut sizes = [0; Dims::MOST];
        match sizes.get_mut(..shape.len()) {
            Some(part) => part.copy_from_slice(shape),
            None => {
                let message = format!("{shape:?} has more than {} dimensions", Dims::MOST);
                return Err(Error::op("tensor", message));
            }
        }
        Ok(Dims { count: shape.len() as u8, sizes })
    }
}

impl Deref for Dims {
    type Target = [usize];

    fn deref(&self) -> &[usize] {
        &self.sizes[..usize::from(self.count)]
    }
}

impl DerefMut for Dims {
    fn deref_mut(&mut self) -> &mut [usize] {
        &mut self.sizes[..usize::from(self.count)]
    }
}

impl fmt::Debug for Dims {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self[..].fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shape_is_held_as_it_is_and_five_dimensions_are_refused() {
        for shape in [&[][..], &[3], &[2, 0, 5], &[1, 2, 3, 4]] {
            assert_eq!(&*Dims::of(shape).unwrap(), shape);
        }
        assert!(Dims::of(&[1; 5]).is_err());
    }
}
