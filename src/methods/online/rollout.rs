//! One completion, and how completions are kept in a checkpoint. Layer 7.
//!
//! Invariant: what is read back has the bits that were written.

use crate::autograd::Cx;
use crate::error::Result;
use crate::tensor::Tensor;

/// One completion of a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rollout {
    /// Index of the prompt.
    pub prompt: usize,
    pub ids: Vec<u32>,
    /// Log-probs of its tokens when they were sampled: at the sampling temperature, of the full
    /// distribution.
    pub logps: Vec<f32>,
    pub entropies: Vec<f32>,
    /// It ended with a stop token, not at the length limit.
    pub finished: bool,
    pub text: String,
}

/// Where each of `lengths` values starts when they lie side by side, and where the last ends.
pub fn starts(lengths: impl IntoIterator<Item = usize>) -> Vec<usize> {
    let mut starts = vec![0];
    for n in lengths {
        starts.push(starts[starts.len() - 1] + n);
    }
    starts
}

/// [`starts`] on the device, I32 [n + 1].
pub fn starts_tensor(cx: &Cx, lengths: impl IntoIterator<Item = usize>) -> Result<Tensor> {
    let starts: Vec<i32> = starts(lengths).into_iter().map(|s| s as i32).collect();
    cx.ints("sequence starts", &starts)
}

/// Values of sequences side by side, taken apart.
pub fn split<T: Clone>(values: &[T], lengths: impl IntoIterator<Item = usize>) -> Vec<Vec<T>> {
    starts(lengths).windows(2).map(|w| values[w[0]..w[1]].to_vec()).collect()
}

/// Something that a checkpoint keeps.
pub trait StoredRollout: Sized {
    fn write(&self, out: &mut StateWriter);
    fn read(from: &mut StateReader) -> Option<Self>;
    /// Whether it is one of `prompts` prompts and each of its lists has a value a token.
    fn fits(&self, prompts: usize) -> bool;
}

impl StoredRollout for Rollout {
    fn write(&self, out: &mut StateWriter) {
        out.word(self.prompt as u64);
        out.word(u64::from(self.finished));
        out.bytes(self.text.as_bytes());
        out.values(&self.ids);
        out.values(&self.logps);
        out.values(&self.entropies);
    }

    fn read(from: &mut StateReader) -> Option<Rollout> {
        let (prompt, finished) = (from.word()? as usize, from.word()? == 1);
        let text = String::from_utf8(from.bytes()?.to_vec()).ok()?;
        let (ids, logps, entropies) = (from.values()?, from.values()?, from.values()?);
        Some(Rollout { prompt, ids, logps, entropies, finished, text })
    }

    fn fits(&self, prompts: usize) -> bool {
        let n = self.ids.len();
        let lists = self.logps.len() == n && [0, n].contains(&self.entropies.len());
        self.prompt < prompts && lists
    }
}

/// Little-endian words, and byte strings with their length in front.
#[derive(Default)]
pub struct StateWriter(pub Vec<u8>);

impl StateWriter {
    pub fn word(&mut self, v: u64) {
        self.0.extend_from_slice(&v.to_le_bytes());
    }

    pub fn bytes(&mut self, b: &[u8]) {
        self.word(b.len() as u64);
        self.0.extend_from_slice(b);
    }

    pub fn values<T: bytemuck::Pod>(&mut self, values: &[T]) {
        self.bytes(bytemuck::cast_slice(values));
    }
}

pub struct StateReader<'a>(pub &'a [u8]);

impl<'a> StateReader<'a> {
    pub fn word(&mut self) -> Option<u64> {
        let (head, tail) = self.0.split_first_chunk::<8>()?;
        self.0 = tail;
        Some(u64::from_le_bytes(*head))
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let n = self.word()? as usize;
        let (head, tail) = self.0.split_at_checked(n)?;
        self.0 = tail;
        Some(head)
    }

    pub fn values<T: bytemuck::Pod>(&mut self) -> Option<Vec<T>> {
        let bytes = self.bytes()?;
        bytes.len().is_multiple_of(size_of::<T>()).then(|| bytemuck::pod_collect_to_vec(bytes))
    }
}
