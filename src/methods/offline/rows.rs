//! The tokenised rows of a run, for training and evaluation, and their sources. Layer 7.
//!
//! Invariant: `sources[i]` names the file and line of training row i.

use std::borrow::Cow;
use std::fmt::Display;

use crate::config::{LengthOptions, TruncationOptions};
use crate::data::masked::MaskedSequence;
use crate::data::preference::{Labelled, PairExample, PreferenceOptions, StepExample};
use crate::data::rows::Row;
use crate::data::sft::{SftExample, SftOptions};
pub use crate::data::split::Split;
use crate::data::store::{Places, TokenStore};
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::methods::{MASKS, MaskedIds, MethodInputs, RowPart, RowView};

/// A tokenised row.
pub trait Example {
    /// Index of its source row.
    fn row(&self) -> usize;

    /// Its sequences: ids, and which of them are loss targets.
    fn sequences(&self) -> Vec<(&[u32], &[bool])>;

    /// Training signals beside the masks (labels, a margin), for digests.
    fn labels(&self) -> Vec<u8> {
        Vec::new()
    }

    /// An example from its stored sequences and labels. None if they are of another kind.
    fn of_stored(sequences: Vec<MaskedSequence>, labels: &[u8], row: usize) -> Option<Self>
    where
        Self: Sized;

    /// The names of its sequences, if it has several.
    fn names(&self) -> &'static [&'static str] {
        &[""]
    }

    /// Text to show a reader beside its sequences.
    fn note(&self) -> String {
        String::new()
    }
}

/// What the loop over rows and the memory plan need to know about them.
pub trait RowSet {
    fn count(&self, split: Split) -> usize;
    /// Tokens of the longest sequence of either split.
    fn longest(&self) -> usize;
    /// Tokens of the widest micro-batch of `rows` rows, one sequence per row.
    fn widest(&self, rows: usize) -> usize {
        rows * self.longest()
    }
    /// `file:line` of a training row.
    fn source(&self, row: usize) -> String;
    /// Adds the contents of a split's rows, in order.
    fn digest(&self, split: Split, digest: &mut Digest);
    /// The first training sequences.
    fn masks(&self) -> Vec<MaskedIds>;
    /// A training row in the form that the method trains on, for `temper data`.
    fn view(&self, row: usize) -> RowView {
        RowView { places: vec![self.source(row)], ..RowView::default() }
    }
    /// The rows of a split, for the cache. None: they are built again at each start.
    fn store(&self, _split: Split) -> Option<Cow<'_, TokenStore>> {
        None
    }
}

#[derive(Default)]
pub struct Rows<E> {
    pub train: Vec<E>,
    pub eval: Vec<E>,
    sources: Places,
    eval_sources: Places,
}

/// The examples of a stored split.
fn stored<E: Example>(store: &TokenStore) -> Result<(Vec<E>, Places)> {
    let sequence = |(ids, mask): (&[u32], &[bool])| MaskedSequence {
        input_ids: ids.to_vec(),
        target_mask: mask.to_vec(),
    };
    let example = |row: usize| {
        let sequences = store.sequences(row).map(sequence).collect();
        E::of_stored(sequences, store.labels(row), row)
            .ok_or_else(|| Error::Run("the row cache holds rows of another kind".into()))
    };
    let examples = (0..store.count()).map(example).collect::<Result<_>>()?;
    Ok((examples, store.places.clone()))
}

fn places<E: Example>(examples: &[E], rows: &[Row]) -> Places {
    let mut places = Places::default();
    examples.iter().for_each(|e| places.push_row(&rows[e.row()]));
    places
}

impl<E: Example> Rows<E> {
    /// Tokenises both splits. Also returns a summary of the training rows to print.
    pub fn tokenise<S: Display>(
        inputs: &MethodInputs,
        encode: impl Fn(Split, &[Row]) -> Result<(Vec<E>, S)>,
    ) -> Result<(Rows<E>, String)> {
        if let Some(run) = inputs.stored {
            let (train, sources) = stored(&run.train)?;
            let (eval, eval_sources) = stored(&run.eval)?;
            return Ok((Rows { train, eval, sources, eval_sources }, run.summary.clone()));
        }
        let (train, stats) = encode(Split::Train, inputs.train)?;
        let eval = match inputs.eval {
            [] => Vec::new(),
            rows => encode(Split::Eval, rows)?.0,
        };
        let (sources, eval_sources) = (places(&train, inputs.train), places(&eval, inputs.eval));
        Ok((Rows { train, eval, sources, eval_sources }, stats.to_string()))
    }

    /// Training rows that come from no file; `source` names each.
    pub fn of_examples(train: Vec<E>, source: impl Fn(usize) -> String) -> Rows<E> {
        let mut sources = Places::default();
        (0..train.len()).for_each(|row| sources.push_name(&source(row)));
        Rows { train, eval: Vec::new(), sources, eval_sources: Places::default() }
    }

    pub fn of(&self, split: Split) -> &[E] {
        match split {
            Split::Train => &self.train,
            Split::Eval => &self.eval,
        }
    }

    pub fn pick(&self, split: Split, rows: &[usize]) -> Vec<&E> {
        rows.iter().map(|r| &self.of(split)[*r]).collect()
    }

    /// Every row of both splits, training rows first.
    pub fn all(&self) -> impl Iterator<Item = &E> {
        self.train.iter().chain(&self.eval)
    }

    /// The index of a row of `split` in [`Rows::all`].
    pub fn index(&self, split: Split, row: usize) -> usize {
        if split == Split::Train { row } else { self.train.len() + row }
    }
}

impl<E: Example> RowSet for Rows<E> {
    fn count(&self, split: Split) -> usize {
        self.of(split).len()
    }

    fn longest(&self) -> usize {
        self.all().flat_map(E::sequences).map(|s| s.0.len()).max().unwrap_or(1)
    }

    fn source(&self, row: usize) -> String {
        self.sources.text(row)
    }

    fn view(&self, row: usize) -> RowView {
        let example = &self.train[row];
        let part = |(i, (ids, mask)): (usize, (&[u32], &[bool]))| RowPart {
            name: example.names().get(i).copied().unwrap_or_default(),
            ids: ids.to_vec(),
            mask: mask.to_vec(),
        };
        RowView {
            places: self.sources.lines(row),
            parts: example.sequences().into_iter().enumerate().map(part).collect(),
            note: example.note(),
        }
    }

    fn store(&self, split: Split) -> Option<Cow<'_, TokenStore>> {
        let mut store = TokenStore::default();
        for example in self.of(split) {
            store.add_labelled(example.sequences(), &example.labels());
        }
        store.places = match split {
            Split::Train => self.sources.clone(),
            Split::Eval => self.eval_sources.clone(),
        };
        Some(Cow::Owned(store))
    }

    fn digest(&self, split: Split, digest: &mut Digest) {
        for example in self.of(split) {
            let sequences = example.sequences();
            digest.number(sequences.len() as u64);
            for (ids, mask) in sequences {
                digest.ids(ids);
                digest.mask(mask);
            }
            digest.bytes(&example.labels());
        }
    }

    fn masks(&self) -> Vec<MaskedIds> {
        let sequences = self.train.iter().flat_map(E::sequences);
        sequences.take(MASKS).map(|(ids, mask)| (ids.to_vec(), mask.to_vec())).collect()
    }
}

fn view(s: &MaskedSequence) -> (&[u32], &[bool]) {
    (&s.input_ids, &s.target_mask)
}

impl Example for PairExample {
    fn row(&self) -> usize {
        self.row
    }

    fn sequences(&self) -> Vec<(&[u32], &[bool])> {
        vec![view(&self.chosen), view(&self.rejected)]
    }

    fn labels(&self) -> Vec<u8> {
        self.margin.map(|m| m.to_le_bytes().to_vec()).unwrap_or_default()
    }

    fn of_stored(sequences: Vec<MaskedSequence>, labels: &[u8], row: usize) -> Option<Self> {
        let [chosen, rejected] = <[MaskedSequence; 2]>::try_from(sequences).ok()?;
        let margin = match labels {
            [] => None,
            bytes => Some(f32::from_le_bytes(bytes.try_into().ok()?)),
        };
        Some(PairExample::new(chosen, rejected, margin, row))
    }

    fn names(&self) -> &'static [&'static str] {
        &["chosen", "rejected"]
    }

    fn note(&self) -> String {
        self.margin.map(|m| format!("margin {m}")).unwrap_or_default()
    }
}

impl Example for SftExample {
    fn row(&self) -> usize {
        self.row
    }

    fn sequences(&self) -> Vec<(&[u32], &[bool])> {
        vec![(&self.input_ids, &self.target_mask)]
    }

    fn of_stored(sequences: Vec<MaskedSequence>, _: &[u8], row: usize) -> Option<Self> {
        let [one] = <[MaskedSequence; 1]>::try_from(sequences).ok()?;
        Some(SftExample { input_ids: one.input_ids, target_mask: one.target_mask, row })
    }
}

/// A completion with its label and, for KTO's baseline, the same prompt with another row's
/// completion.
pub struct LabelledPair {
    pub own: MaskedSequence,
    pub crossed: Option<MaskedSequence>,
    pub label: bool,
    row: usize,
}

impl LabelledPair {
    pub fn new(
        e: &Labelled,
        max_length: Option<usize>,
        crossed: Option<MaskedSequence>,
    ) -> LabelledPair {
        LabelledPair { own: e.sequence(max_length), crossed, label: e.label, row: e.row }
    }
}

impl Example for LabelledPair {
    fn row(&self) -> usize {
        self.row
    }

    fn sequences(&self) -> Vec<(&[u32], &[bool])> {
        std::iter::once(&self.own).chain(&self.crossed).map(view).collect()
    }

    fn labels(&self) -> Vec<u8> {
        vec![u8::from(self.label)]
    }

    fn of_stored(sequences: Vec<MaskedSequence>, labels: &[u8], row: usize) -> Option<Self> {
        let mut sequences = sequences.into_iter();
        let (own, crossed, rest) = (sequences.next()?, sequences.next(), sequences.next());
        let &[label @ (0 | 1)] = labels else { return None };
        rest.is_none().then_some(LabelledPair { own, crossed, label: label == 1, row })
    }

    fn names(&self) -> &'static [&'static str] {
        &["completion", "with another row's completion, for the KL"]
    }

    fn note(&self) -> String {
        format!("label {}", self.label)
    }
}

/// Steps with labels. The mask marks the labelled tokens.
pub struct LabelledSteps {
    pub example: StepExample,
    mask: Vec<bool>,
}

impl LabelledSteps {
    pub fn new(example: StepExample) -> LabelledSteps {
        let labelled = |i| example.labels.iter().any(|(at, _)| *at == i);
        let mask = (0..example.input_ids.len()).map(labelled).collect();
        LabelledSteps { example, mask }
    }
}

impl Example for LabelledSteps {
    fn row(&self) -> usize {
        self.example.row
    }

    fn sequences(&self) -> Vec<(&[u32], &[bool])> {
        vec![(&self.example.input_ids, &self.mask)]
    }

    fn labels(&self) -> Vec<u8> {
        self.example.labels.iter().map(|(_, right)| u8::from(*right)).collect()
    }

    fn of_stored(sequences: Vec<MaskedSequence>, labels: &[u8], row: usize) -> Option<Self> {
        let [one] = <[MaskedSequence; 1]>::try_from(sequences).ok()?;
        let marked = one.target_mask.iter().enumerate().filter(|(_, m)| **m).map(|(at, _)| at);
        let labels: Vec<(usize, bool)> = marked.zip(labels.iter().map(|l| *l == 1)).collect();
        Some(LabelledSteps::new(StepExample { input_ids: one.input_ids, labels, row }))
    }

    fn note(&self) -> String {
        let right = |(_, right): &(usize, bool)| if *right { "right" } else { "wrong" };
        format!("steps: {}", self.example.labels.iter().map(right).collect::<Vec<_>>().join(", "))
    }
}

/// The number of loss targets of a sequence: the first token has no predecessor and is never one.
pub fn targets(mask: &[bool]) -> usize {
    mask.iter().skip(1).filter(|t| **t).count()
}

impl From<&LengthOptions> for PreferenceOptions {
    fn from(o: &LengthOptions) -> PreferenceOptions {
        let (max_length, on_truncation) = (o.max_length, o.on_truncation);
        PreferenceOptions { max_length, on_truncation, ..PreferenceOptions::default() }
    }
}

impl From<&TruncationOptions> for PreferenceOptions {
    fn from(o: &TruncationOptions) -> PreferenceOptions {
        PreferenceOptions { truncation_mode: o.truncation_mode, ..(&o.length).into() }
    }
}

impl From<&TruncationOptions> for SftOptions {
    fn from(o: &TruncationOptions) -> SftOptions {
        let TruncationOptions { truncation_mode, length } = o;
        SftOptions {
            max_length: length.max_length,
            truncation_mode: *truncation_mode,
            on_truncation: length.on_truncation,
            ..SftOptions::default()
        }
    }
}
