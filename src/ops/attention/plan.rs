//! Which rows of a packed batch see which: built on the host once per batch, shared by all layers.
//! Layer 4.
//!
//! Invariant: every table is derived from the segments alone, and segments cover the rows in order,
//! without gap or overlap.

use std::sync::{Arc, OnceLock};

use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::kernels::{HOPPER_BWD_ROWS, MMA_ROWS, SEGMENT_INTS, hopper_fwd_rows};
use crate::tensor::Tensor;

/// A run of packed rows: a sequence, a shared prompt, or the continuation of one. Its queries see
/// all rows of its prefix segment, then causally its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub start: usize,
    pub len: usize,
    /// Index of the segment whose rows precede these. That segment has no prefix itself.
    pub prefix: Option<usize>,
}

#[derive(Debug)]
pub struct AttnPlan {
    pub segments: Vec<Segment>,
    pub rows: usize,
    /// Number of (query, key) pairs without a window: 4 D flops each in a forward, 10 D in a
    /// backward.
    pub pairs: f64,
    tables: OnceLock<Tables>,
}

/// The index tables that kernels read.
pub(super) struct Tables {
    /// I32 [rows].
    pub row_segment: Tensor,
    /// I32 [n, 6]: start, length, start and length of the prefix, the range in `children`.
    pub segments: Tensor,
    /// I32: for each prefix segment, the segments that continue it.
    pub children: Tensor,
    /// I32 [tiles, 2]: segment and first row in it of each 64 rows, those with the most keys before
    /// them first.
    pub query_tiles: Tensor,
    /// `query_tiles` with as many rows as the forward of head size 128 takes on Hopper.
    pub hopper_tiles: Tensor,
    /// `query_tiles` of HOPPER_BWD_ROWS rows.
    pub wide_tiles: Tensor,
    /// `query_tiles` in the order of the number of queries that see them.
    pub key_tiles: Tensor,
    /// `key_tiles` of HOPPER_BWD_ROWS rows.
    pub wide_key_tiles: Tensor,
}

impl std::fmt::Debug for Tables {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:?}, {:?}", self.row_segment, self.segments)
    }
}

impl AttnPlan {
    /// Checks the segments and uploads the tables. Errors name the wrong segment.
    pub fn new(cx: &Cx, segments: &[Segment]) -> Result<Arc<AttnPlan>> {
        let plan = AttnPlan::on_host(segments)?;
        plan.tables(cx)?;
        Ok(plan)
    }

    /// `new`, but the tables are uploaded at first use.
    pub fn on_host(segments: &[Segment]) -> Result<Arc<AttnPlan>> {
        let wrong =
            |i: usize, what: String| Err(Error::op("attention", format!("segment {i}: {what}")));
        let (mut rows, mut pairs) = (0, 0.0);
        for (i, s) in segments.iter().enumerate() {
            if s.start != rows || s.len == 0 {
                return wrong(
                    i,
                    format!(
                        "starts at row {} with {} rows, expected row {rows} and some",
                        s.start, s.len
                    ),
                );
            }
            rows += s.len;
            let mut before = 0;
            if let Some(p) = s.prefix {
                match segments.get(p) {
                    Some(prefix) if p != i && prefix.prefix.is_none() => before = prefix.len,
                    Some(_) => {
                        return wrong(
                            i,
                            format!(
                                "its prefix {p} has a prefix itself; only one level is allowed"
                            ),
                        );
                    }
                    None => {
                        return wrong(
                            i,
                            format!("its prefix {p} is not there, there are {}", segments.len()),
                        );
                    }
                }
            }
            pairs += s.len as f64 * (before as f64 + (s.len as f64 + 1.0) / 2.0);
        }
        if rows == 0 || rows > i32::MAX as usize / 2 {
            return Err(Error::op("attention", format!("a batch of {rows} rows")));
        }
        Ok(Arc::new(AttnPlan { segments: segments.to_vec(), rows, pairs, tables: OnceLock::new() }))
    }

    /// Packed sequences of these lengths, without shared prefixes.
    pub fn sequences(cx: &Cx, lengths: &[usize]) -> Result<Arc<AttnPlan>> {
        let mut start = 0;
        let segment = |&len: &usize| {
            start += len;
            Segment { start: start - len, len, prefix: None }
        };
        AttnPlan::new(cx, &lengths.iter().map(segment).collect::<Vec<_>>())
    }

    /// The number of rows before a segment's own in its sequence.
    pub fn before(&self, segment: usize) -> usize {
        self.segments[segment].prefix.map_or(0, |p| self.segments[p].len)
    }

    pub(super) fn tables(&self, cx: &Cx) -> Result<&Tables> {
        if let Some(tables) = self.tables.get() {
            return Ok(tables);
        }
        let made = self.upload(cx)?;
        Ok(self.tables.get_or_init(|| made))
    }

    fn upload(&self, cx: &Cx) -> Result<Tables> {
        let n = self.segments.len();
        let mut of_prefix: Vec<Vec<i32>> = vec![Vec::new(); n];
        for (i, s) in self.segments.iter().enumerate() {
            if let Some(p) = s.prefix {
                of_prefix[p].push(i as i32);
            }
        }
        let (mut row_segment, mut table, mut children) =
            (Vec::with_capacity(self.rows), Vec::new(), Vec::new());
        let (mut by_keys, mut hopper, mut by_queries) = (Vec::new(), Vec::new(), Vec::new());
        let (mut wide, mut wide_by_queries) = (Vec::new(), Vec::new());
        for (i, s) in self.segments.iter().enumerate() {
            row_segment.resize(s.start + s.len, i as i32);
            let prefix_start = s.prefix.map_or(0, |p| self.segments[p].start);
            let first_child = children.len();
            children.extend(&of_prefix[i]);
            table.extend(
                [s.start, s.len, prefix_start, self.before(i), first_child, children.len()]
                    .map(|v| v as i32),
            );
            let in_children: usize =
                of_prefix[i].iter().map(|c| self.segments[*c as usize].len).sum();
            let tile = |first: usize| (self.before(i) + first, i as i32, first as i32);
            hopper.extend((0..s.len).step_by(hopper_fwd_rows(128)).map(tile));
            wide.extend((0..s.len).step_by(HOPPER_BWD_ROWS).map(tile));
            by_keys.extend((0..s.len).step_by(MMA_ROWS).map(tile));
            let tile = |first: usize| (s.len - first + in_children, i as i32, first as i32);
            wide_by_queries.extend((0..s.len).step_by(HOPPER_BWD_ROWS).map(tile));
            by_queries.extend((0..s.len).step_by(MMA_ROWS).map(tile));
        }
        children.push(-1); // never read: keeps the table from being empty
        let order = |mut tiles: Vec<(usize, i32, i32)>| -> Vec<i32> {
            tiles.sort_by_key(|t| (std::cmp::Reverse(t.0), t.1, t.2));
            tiles.iter().flat_map(|t| [t.1, t.2]).collect()
        };
        let ints = |name: &str, data: &[i32], cols: usize| {
            Tensor::from_host(&cx.pool, name, DType::I32, &[data.len() / cols, cols], data)
        };
        Ok(Tables {
            row_segment: cx.ints("attention rows", &row_segment)?,
            segments: ints("attention segments", &table, SEGMENT_INTS)?,
            children: cx.ints("attention children", &children)?,
            query_tiles: ints("attention query tiles", &order(by_keys), 2)?,
            hopper_tiles: ints("attention hopper tiles", &order(hopper), 2)?,
            wide_tiles: ints("attention wide tiles", &order(wide), 2)?,
            key_tiles: ints("attention key tiles", &order(by_queries), 2)?,
            wide_key_tiles: ints("attention wide key tiles", &order(wide_by_queries), 2)?,
        })
    }
}
