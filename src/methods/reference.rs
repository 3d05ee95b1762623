//! The model that a policy is compared with: the base under an adapter, a second folder, or the
//! initial weights. Layer 7.
//!
//! Invariant: the reference changes in [`Reference::stepped`] alone, and only if `sync_ref_model`
//! is on. Log-probs kept on disk are named after the weights, the rows and the kind of device that
//! computed them, so a stale file is never read.

use std::ops::Range;
use std::path::{Path, PathBuf};

use crate::autograd::Cx;
use crate::config::{ReferenceOptions, TrainingConfig};
use crate::device::DType;
use crate::error::{Error, Result};
use crate::fsio;
use crate::methods::{MethodInputs, StateFiles};
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::params::ParamSet;
use crate::tensor::ParamSetId;
use crate::tensor::Tensor;

const STATE: &str = "reference.f32";

/// The inputs that a reference is built from.
#[derive(Clone, Default)]
pub struct ReferenceSetup {
    /// Whether there is none: its log-probs count as 0.
    pub free: bool,
    pub options: ReferenceOptions,
    /// Rows per batch when log-probs are precomputed.
    pub batch: usize,
    /// Tokens of the longest sequence.
    pub longest: usize,
    /// The run's folder.
    pub output: PathBuf,
}

#[derive(Default)]
pub struct Reference {
    setup: ReferenceSetup,
    source: LogProbSource,
}

/// The source of the reference's log-probs.
#[derive(Default)]
enum LogProbSource {
    #[default]
    None,
    Model(Box<Decoder>),
    Stored(Vec<f32>),
}

impl Reference {
    pub fn new(setup: ReferenceSetup) -> Reference {
        Reference { setup, source: LogProbSource::None }
    }

    /// The reference of a preference method over the rows of `inputs`.
    pub fn of(
        options: &ReferenceOptions,
        training: &TrainingConfig,
        inputs: &MethodInputs,
        longest: usize,
    ) -> Reference {
        let batch = options.precompute_ref_batch_size;
        let batch = batch.unwrap_or(training.per_device_train_batch_size).max(1);
        let (options, output) = (options.clone(), inputs.output.to_path_buf());
        Reference::new(ReferenceSetup { free: false, options, batch, longest, output })
    }

    /// Uses no reference model if `free`: its log-probs count as 0.
    pub fn free(mut self, free: bool) -> Reference {
        self.setup.free = free;
        self
    }

    /// The reference model, if its log-probs are computed during training.
    pub fn model(&self) -> Option<&Decoder> {
        match &self.source {
            LogProbSource::Model(model) => Some(model),
            _ => None,
        }
    }

    /// The reference's values at `indices` of what [`Reference::attached`] precomputed, F32 `[n]`.
    /// If nothing was precomputed, what `compute` returns for the model; zeros without a reference.
    pub fn values(
        &self,
        cx: &mut Cx,
        indices: &[usize],
        compute: impl FnOnce(&mut Cx, &Decoder) -> Result<Tensor>,
    ) -> Result<Tensor> {
        match &self.source {
            LogProbSource::Model(model) => compute(cx, model),
            LogProbSource::Stored(all) => {
                floats(cx, &indices.iter().map(|i| all[*i]).collect::<Vec<f32>>())
            }
            LogProbSource::None if self.setup.free => floats(cx, &vec![0.0; indices.len()]),
            LogProbSource::None => {
                Err(Error::op("reference", "is missing; attach comes before the first step"))
            }
        }
    }

    /// Takes the reference from the initial policy or from its folder. If log-probs are
    /// precomputed, `compute` returns those of a range of the `rows` rows, whose digest is
    /// `digest`, unless the disk has them.
    pub fn attached(
        &self,
        cx: &mut Cx,
        policy: &Decoder,
        rows: usize,
        digest: impl Fn() -> Result<u32>,
        compute: impl Fn(&mut Cx, &Decoder, Range<usize>) -> Result<Tensor>,
    ) -> Result<Reference> {
        let ReferenceSetup { free, options, batch, longest, output } = &self.setup;
        let with = |source| Ok(Reference { setup: self.setup.clone(), source });
        if *free {
            return with(LogProbSource::None);
        }
        if options.sync.sync_ref_model && policy.adapter.is_some() {
            return Err(Error::Config(
                "sync_ref_model = true: the reference of an adapter is the base, which does not \
                 change; train all weights"
                    .into(),
            ));
        }
        let other = match &options.ref_model {
            Some(name) => Some(load(cx, policy, name, "ref_model", *longest)?),
            None => None,
        };
        if !options.precompute_ref_log_probs {
            let model = other.map_or_else(|| policy.reference(cx), Ok)?;
            return with(LogProbSource::Model(Box::new(model)));
        }
        let model = other.as_ref().unwrap_or(policy);
        let name = format!("ref_log_probs-{:08x}{:08x}.f32", weights_digest(cx, model)?, digest()?);
        let path = output.join(name);
        if path.is_file() {
            cx.observer
                .info(&format!("the reference's log-probs are read from {}", path.display()));
            return with(LogProbSource::Stored(read_floats(&path)?));
        }
        let mut values = Vec::new();
        for start in (0..rows).step_by(*batch) {
            let range = start..rows.min(start + batch);
            values.extend(compute(cx, model, range)?.to_f32()?);
        }
        fsio::atomic_write(&path, bytemuck::cast_slice(&values))?;
        with(LogProbSource::Stored(values))
    }

    /// The policy's share, the steps between two updates, and the model, if the reference is
    /// updated.
    fn moving(&self) -> Option<(f64, u64, &Decoder)> {
        let (alpha, every) = self.setup.options.sync.schedule()?;
        Some((alpha, every, self.model()?))
    }

    /// Moves the reference towards the policy, if this step is due for it.
    pub fn stepped(&self, policy: &Decoder, done: u64) -> Result<()> {
        let Some((alpha, every, model)) = self.moving() else { return Ok(()) };
        if !done.is_multiple_of(every) {
            return Ok(());
        }
        let (keep, take) = ((1.0 - alpha) as f32, alpha as f32);
        for i in 0..model.params.specs.len() {
            let mut values = model.params.weight_view(i)?.to_f32()?;
            let new = policy.params.weight_view(i)?.to_f32()?;
            values.iter_mut().zip(new).for_each(|(r, p)| *r = take.mul_add(p, *r * keep));
            model.params.store(i, &values)?;
        }
        Ok(())
    }

    /// The weights of a reference that is updated, for a checkpoint.
    pub fn state(&self) -> Result<StateFiles> {
        let Some((_, _, model)) = self.moving() else { return Ok(Vec::new()) };
        let mut bytes = Vec::with_capacity(4 * model.params.count());
        for i in 0..model.params.specs.len() {
            bytes.extend_from_slice(bytemuck::cast_slice(&model.params.weight_view(i)?.to_f32()?));
        }
        Ok(vec![(STATE.into(), bytes)])
    }

    pub fn restore(&self, dir: &Path) -> Result<()> {
        let Some((_, _, model)) = self.moving() else { return Ok(()) };
        let path = dir.join(STATE);
        let values = read_floats(&path)?;
        if values.len() != model.params.count() {
            let message =
                format!("has {} values, but the model has {}", values.len(), model.params.count());
            return Err(Error::checkpoint(&path, message));
        }
        let mut rest = values.as_slice();
        for i in 0..model.params.specs.len() {
            let (own, tail) = rest.split_at(model.params.specs[i].len());
            model.params.store(i, own)?;
            rest = tail;
        }
        Ok(())
    }
}

/// A frozen model with `policy`'s vocabulary, from the folder (or hub name) given by the option
/// `key`.
pub fn load(cx: &Cx, policy: &Decoder, name: &str, key: &str, longest: usize) -> Result<Decoder> {
    let dir = resolve_model(name)?;
    let model = Decoder::folder(&dir)?.set(ParamSetId::Reference).positions(longest);
    let config = model.config();
    if config.task != policy.config.task {
        let message =
            format!("{key}: holds {:?}, but the model is {:?}", config.task, policy.config.task);
        return Err(Error::model(&dir, message));
    }
    if config.vocab_size != policy.config.vocab_size {
        let (theirs, ours) = (config.vocab_size, policy.config.vocab_size);
        let message = format!(
            "{key}: has a vocabulary of {theirs} tokens, but the model has {ours}, so their \
             log-probs cannot be compared; give a folder of the same family and tokenizer"
        );
        return Err(Error::model(&dir, message));
    }
    model.build(cx)
}

/// A digest of everything that determines a model's log-probs: its weights, storage type and kind
/// of device.
fn weights_digest(cx: &Cx, model: &Decoder) -> Result<u32> {
    let mut crc = crc32fast::Hasher::new();
    crc.update(format!("{} {} {:?}", cx.device.name(), cx.dtype.name(), model.config).as_bytes());
    let mut add = |params: &ParamSet| -> Result<()> {
        for i in 0..params.specs.len() {
            crc.update(bytemuck::cast_slice(&params.weight_view(i)?.to_f32()?));
        }
        Ok(())
    };
    add(&model.params)?;
    if let Some(adapter) = &model.adapter {
        add(&adapter.params)?;
    }
    Ok(crc.finalize())
}

/// A digest of everything beside the model that determines the log-probs of rows: all sequences,
/// then all weights.
#[derive(Default)]
pub struct RowsDigest(crc32fast::Hasher);

impl RowsDigest {
    pub fn sequence(&mut self, (ids, mask): (&[u32], &[bool])) {
        self.0.update(&(ids.len() as u64).to_le_bytes());
        self.0.update(bytemuck::cast_slice(ids));
        self.0.update(bytemuck::cast_slice(mask));
    }

    pub fn weights(&mut self, weights: &[f32]) {
        self.0.update(bytemuck::cast_slice(weights));
    }

    pub fn finish(self) -> u32 {
        self.0.finalize()
    }
}

/// F32 `[n]`.
pub fn floats(cx: &Cx, values: &[f32]) -> Result<Tensor> {
    Tensor::from_host(&cx.pool, "loss inputs", DType::F32, &[values.len()], values)
}

fn read_floats(path: &Path) -> Result<Vec<f32>> {
    let bytes = fsio::read(path)?;
    match bytes.len() % 4 {
        0 => Ok(bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()),
        _ => Err(Error::checkpoint(
            path,
            format!("has {} bytes, which is not a whole number of values", bytes.len()),
        )),
    }
}
