//! The tokenised rows of a run, for training and evaluation, and their sources. Layer 7.
//!
//! Invariant: rows are read from their store on demand; only those of a batch are in memory.

use std::marker::PhantomData;

use crate::config::{LengthOptions, TruncationOptions};
use crate::data::feed::{Encoded, RowEncoder, RowFeed};
use crate::data::masked::MaskedSequence;
use crate::data::preference::{Labelled, PairExample, PreferenceOptions, StepExample};
use crate::data::rows::{Row, RowPlace};
use crate::data::sft::{SftExample, SftOptions};
pub use crate::data::split::Split;
use crate::data::store::TokenStore;
use crate::digest::Digest;
use crate::error::{Error, Result};
use crate::methods::{MASKS, MaskedIds, MethodInputs, RowPart, RowView};

/// A tokenised row.
pub trait Example {
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

/// What the loop over rows and the memory plan need to know about them. Errors: the rows cannot be
/// read.
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
    fn digest(&self, split: Split, digest: &mut Digest) -> Result<()>;
    /// The first training sequences.
    fn masks(&self) -> Result<Vec<MaskedIds>>;
    /// A training row in the form that the method trains on, for `temper data`.
    fn view(&self, row: usize) -> Result<RowView> {
        Ok(RowView { places: vec![self.source(row)], ..RowView::default() })
    }
    /// The tokens of a split, for the cache. None: they are made again at each start.
    fn store(&self, _split: Split) -> Option<&TokenStore> {
        None
    }
}

/// The tokens of both splits, as rows of some kind.
pub struct Rows<E> {
    train: TokenStore,
    eval: TokenStore,
    kind: PhantomData<E>,
}

/// Receives the examples of some rows; the flag marks the last call.
pub type TakeExamples<'a, E> = dyn FnMut(&mut TokenStore, Encoded<E>, bool) -> Result<()> + 'a;

/// Tokenises the rows of a split as they are read. None: there are no rows to evaluate on.
pub fn tokenise<R: RowEncoder>(
    feed: &dyn RowFeed,
    split: Split,
    mut encoder: R,
    take: &mut TakeExamples<R::Example>,
) -> Result<Option<(TokenStore, R::Stats)>> {
    let (mut store, mut some) = (feed.store(), false);
    feed.each(split, &mut |rows: Vec<Row>| {
        some = true;
        let mut examples = Vec::new();
        encoder.encode(&rows, &mut examples)?;
        drop(rows);
        take(&mut store, examples, false)
    })?;
    if split == Split::Eval && !some {
        return Ok(None);
    }
    let mut rest = Vec::new();
    let stats = encoder.finish(&mut rest)?;
    take(&mut store, rest, true)?;
    store.write()?;
    Ok(Some((store, stats)))
}

fn add<E: Example>(store: &mut TokenStore, place: &RowPlace, example: &E) -> Result<()> {
    store.add_labelled(example.sequences(), &example.labels())?;
    store.places.push_row(place);
    Ok(())
}

impl<E: Example> Rows<E> {
    fn new(train: TokenStore, eval: TokenStore) -> Rows<E> {
        Rows { train, eval, kind: PhantomData }
    }

    /// Tokenises both splits with `encoder` and converts its examples with `make`. Also returns the
    /// summary of the training rows.
    pub fn tokenise<R: RowEncoder>(
        inputs: &MethodInputs,
        encoder: impl Fn(Split) -> Result<R>,
        make: impl Fn(R::Example) -> E,
    ) -> Result<(Rows<E>, String)> {
        if let Some(run) = inputs.stored {
            return Ok((Rows::new(run.train.clone(), run.eval.clone()), run.summary.clone()));
        }
        let made = |split: Split| {
            let mut take = |store: &mut TokenStore, examples: Encoded<R::Example>, _: bool| {
                let mut examples = examples.into_iter();
                examples.try_for_each(|(place, made)| add(store, &place, &make(made)))
            };
            inputs.feed(|feed| tokenise(feed, split, encoder(split)?, &mut take))
        };
        // Evaluation rows come first: they are fewer, so their errors come early.
        let eval = made(Split::Eval)?.map(|(store, _)| store).unwrap_or_default();
        match made(Split::Train)? {
            Some((train, stats)) => Ok((Rows::new(train, eval), stats.to_string())),
            None => Err(Error::Run("there are no rows to train on".into())),
        }
    }

    /// Training rows that come from no file; `source` names each.
    pub fn of_examples(train: &[E], source: impl Fn(usize) -> String) -> Result<Rows<E>> {
        let mut store = TokenStore::default();
        for (row, example) in train.iter().enumerate() {
            store.add_labelled(example.sequences(), &example.labels())?;
            store.places.push_name(&source(row));
        }
        Ok(Rows::new(store, TokenStore::default()))
    }

    fn of(&self, split: Split) -> &TokenStore {
        match split {
            Split::Train => &self.train,
            Split::Eval => &self.eval,
        }
    }

    /// A row of a split.
    pub fn example(&self, split: Split, row: usize) -> Result<E> {
        let store = self.of(split);
        let sequence = |(ids, mask): (&[u32], &[bool])| MaskedSequence {
            input_ids: ids.to_vec(),
            target_mask: mask.to_vec(),
        };
        let sequences = store.row(row)?.sequences().map(sequence).collect();
        E::of_stored(sequences, store.labels(row), row)
            .ok_or_else(|| Error::Run("the row cache holds rows of another kind".into()))
    }

    pub fn pick(&self, split: Split, rows: &[usize]) -> Result<Vec<E>> {
        rows.iter().map(|row| self.example(split, *row)).collect()
    }

    /// The labels of a row: its training signals beside the masks.
    pub fn labels(&self, split: Split, row: usize) -> &[u8] {
        self.of(split).labels(row)
    }

    /// Rows of both splits together.
    pub fn total(&self) -> usize {
        self.train.count() + self.eval.count()
    }

    /// Row `index` of all rows, training rows first.
    pub fn nth(&self, index: usize) -> Result<E> {
        match index.checked_sub(self.train.count()) {
            None => self.example(Split::Train, index),
            Some(row) => self.example(Split::Eval, row),
        }
    }

    /// The number of a row of `split` among all.
    pub fn index(&self, split: Split, row: usize) -> usize {
        if split == Split::Train { row } else { self.train.count() + row }
    }
}

impl<E: Example> RowSet for Rows<E> {
    fn count(&self, split: Split) -> usize {
        self.of(split).count()
    }

    fn longest(&self) -> usize {
        self.train.longest().max(self.eval.longest()).unwrap_or(1)
    }

    fn source(&self, row: usize) -> String {
        self.train.places.text(row)
    }

    fn view(&self, row: usize) -> Result<RowView> {
        let example = self.example(Split::Train, row)?;
        let part = |(i, (ids, mask)): (usize, (&[u32], &[bool]))| RowPart {
            name: example.names().get(i).copied().unwrap_or_default(),
            ids: ids.to_vec(),
            mask: mask.to_vec(),
        };
        Ok(RowView {
            places: self.train.places.lines(row),
            parts: example.sequences().into_iter().enumerate().map(part).collect(),
            note: example.note(),
        })
    }

    fn store(&self, split: Split) -> Option<&TokenStore> {
        Some(self.of(split))
    }

    fn digest(&self, split: Split, digest: &mut Digest) -> Result<()> {
        let store = self.of(split);
        for row in 0..store.count() {
            let stored = store.row(row)?;
            digest.number(stored.sequences().count() as u64);
            for (ids, mask) in stored.sequences() {
                digest.ids(ids);
                digest.mask(mask);
            }
            digest.bytes(store.labels(row));
        }
        Ok(())
    }

    fn masks(&self) -> Result<Vec<MaskedIds>> {
        first_sequences(&self.train, MASKS)
    }
}

/// The first `count` sequences of a store.
pub fn first_sequences(store: &TokenStore, count: usize) -> Result<Vec<MaskedIds>> {
    let mut found = Vec::new();
    for row in 0..store.count().min(count) {
        let row = store.row(row)?;
        let owned = |(ids, mask): (&[u32], &[bool])| (ids.to_vec(), mask.to_vec());
        found.extend(row.sequences().take(count - found.len()).map(owned));
    }
    Ok(found)
}

fn view(s: &MaskedSequence) -> (&[u32], &[bool]) {
    (&s.input_ids, &s.target_mask)
}

impl Example for PairExample {
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
}

impl LabelledPair {
    pub fn new(
        e: &Labelled,
        max_length: Option<usize>,
        crossed: Option<MaskedSequence>,
    ) -> LabelledPair {
        LabelledPair { own: e.sequence(max_length), crossed, label: e.label }
    }
}

impl Example for LabelledPair {
    fn sequences(&self) -> Vec<(&[u32], &[bool])> {
        std::iter::once(&self.own).chain(&self.crossed).map(view).collect()
    }

    fn labels(&self) -> Vec<u8> {
        vec![u8::from(self.label)]
    }

    fn of_stored(sequences: Vec<MaskedSequence>, labels: &[u8], _: usize) -> Option<Self> {
        let mut sequences = sequences.into_iter();
        let (own, crossed, rest) = (sequences.next()?, sequences.next(), sequences.next());
        let &[label @ (0 | 1)] = labels else { return None };
        rest.is_none().then_some(LabelledPair { own, crossed, label: label == 1 })
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
