//! A completion, and the format of completions in a checkpoint. Layer 7.
//!
//! Invariant: reading back gives the bits that were written.

use serde_json::Value;

use crate::autograd::Cx;
use crate::error::Result;
use crate::tensor::Tensor;

/// One completion of a prompt.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Rollout {
    /// Index of the prompt.
    pub prompt: usize,
    /// The sampled tokens, which are the ones in the loss.
    pub ids: Vec<u32>,
    /// Log-probs of its tokens at sampling time, under the full distribution at the sampling
    /// temperature.
    pub logps: Vec<f32>,
    pub entropies: Vec<f32>,
    /// Whether it ended with a stop token, not at the length limit.
    pub finished: bool,
    pub text: String,
    /// The whole conversation, if an environment answered.
    pub conversation: Option<Box<Conversation>>,
}

/// A completion of several turns. Everything else about it (log-probs, values, weights) covers its
/// sampled tokens alone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Conversation {
    /// All tokens after the prompt: sampled ones, and between them the environment's.
    pub ids: Vec<u32>,
    /// Which of them were sampled.
    pub sampled: Vec<bool>,
    /// The conversation since the prompt: messages or, if the prompt is a text, one text.
    pub said: Value,
    /// Turns of the model.
    pub turns: usize,
    /// The sum of the environment's rewards; None if it gave none.
    pub reward: Option<f64>,
}

impl Rollout {
    /// All tokens after the prompt.
    pub fn whole(&self) -> &[u32] {
        self.conversation.as_ref().map_or(&self.ids, |c| &c.ids)
    }

    /// Which of them are targets; None: all.
    pub fn targets(&self) -> Option<&[bool]> {
        self.conversation.as_ref().map(|c| c.sampled.as_slice())
    }
}

impl Conversation {
    fn write(&self, out: &mut StateWriter) {
        out.values(&self.ids);
        out.bytes(&self.sampled.iter().map(|s| u8::from(*s)).collect::<Vec<_>>());
        out.bytes(self.said.to_string().as_bytes());
        out.word(self.turns as u64);
        out.word(u64::from(self.reward.is_some()));
        out.word(self.reward.unwrap_or_default().to_bits());
    }

    fn read(from: &mut StateReader) -> Option<Conversation> {
        let ids = from.values()?;
        let sampled = from.bytes()?.iter().map(|s| *s == 1).collect();
        let said = serde_json::from_slice(from.bytes()?).ok()?;
        let turns = from.word()? as usize;
        let (known, reward) = (from.word()? == 1, f64::from_bits(from.word()?));
        Some(Conversation { ids, sampled, said, turns, reward: known.then_some(reward) })
    }

    /// Whether its sampled tokens are `ids`.
    fn fits(&self, ids: &[u32]) -> bool {
        let sampled = self.ids.iter().zip(&self.sampled).filter(|(_, s)| **s).map(|(id, _)| id);
        self.ids.len() == self.sampled.len() && ids.iter().eq(sampled)
    }
}

/// Offsets of concatenated sequences with these `lengths`, and the end of the last.
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

/// Splits concatenated sequences of values.
pub fn split<T: Clone>(values: &[T], lengths: impl IntoIterator<Item = usize>) -> Vec<Vec<T>> {
    starts(lengths).windows(2).map(|w| values[w[0]..w[1]].to_vec()).collect()
}

/// A sample that a checkpoint keeps.
pub trait StoredRollout: Sized {
    fn write(&self, out: &mut StateWriter);
    fn read(from: &mut StateReader) -> Option<Self>;
    /// Whether it belongs to one of `prompts` prompts and each of its lists has one value per
    /// token.
    fn fits(&self, prompts: usize) -> bool;
}

impl StoredRollout for Rollout {
    fn write(&self, out: &mut StateWriter) {
        out.word(self.prompt as u64);
        out.word(u64::from(self.finished) | u64::from(self.conversation.is_some()) << 1);
        out.bytes(self.text.as_bytes());
        out.values(&self.ids);
        out.values(&self.logps);
        out.values(&self.entropies);
        if let Some(conversation) = &self.conversation {
            conversation.write(out);
        }
    }

    fn read(from: &mut StateReader) -> Option<Rollout> {
        let (prompt, flags) = (from.word()? as usize, from.word()?);
        let text = String::from_utf8(from.bytes()?.to_vec()).ok()?;
        let (ids, logps, entropies) = (from.values()?, from.values()?, from.values()?);
        let conversation = match flags & 2 {
            0 => None,
            _ => Some(Box::new(Conversation::read(from)?)),
        };
        let finished = flags & 1 == 1;
        Some(Rollout { prompt, ids, logps, entropies, finished, text, conversation })
    }

    fn fits(&self, prompts: usize) -> bool {
        let n = self.ids.len();
        let lists = self.logps.len() == n && [0, n].contains(&self.entropies.len());
        let whole = self.conversation.as_ref().is_none_or(|c| c.fits(&self.ids));
        self.prompt < prompts && lists && whole
    }
}

/// Little-endian words, and byte strings with a length prefix.
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
