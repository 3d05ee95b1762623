//! The model that a policy is held against: the base under an adapter, a second folder, or the
//! initial weights. Layer 7.
//!
//! Invariant: the reference changes in [`Reference::stepped`] alone, and only where
//! `sync_ref_model` says so. Log-probs kept on disk are named after the weights, the rows and the
//! kind of device that gave them, so a stale file is never read.

use std::path::{Path, PathBuf};

use crate::autograd::Cx;
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::params::ParamSet;
use crate::tensor::ParamSetId;

const STATE: &str = "reference.f32";

/// The keys that say what the reference is.
#[derive(Clone, Default)]
pub struct ReferenceKeys {
    /// There is none: its log-probs count as 0.
    pub free: bool,
    pub folder: Option<String>,
    pub precompute: bool,
    /// The share of the policy that is mixed in, and every how many steps.
    pub sync: Option<(f64, u64)>,
    pub longest: usize,
    /// The run's folder.
    pub output: PathBuf,
}

#[derive(Default)]
pub struct Reference {
    keys: ReferenceKeys,
    model: Option<Decoder>,
    stored: Option<Vec<f32>>,
}

impl Reference {
    pub fn new(keys: ReferenceKeys) -> Reference {
        Reference { keys, model: None, stored: None }
    }

    /// The reference model, where its log-probs are computed as training goes.
    pub fn model(&self) -> Option<&Decoder> {
        self.model.as_ref()
    }

    /// All log-probs, where they were computed beforehand.
    pub fn stored(&self) -> Option<&[f32]> {
        self.stored.as_deref()
    }

    /// Takes the reference from the policy as it starts, or from its folder. Where log-probs are
    /// computed beforehand, `compute` gives them, of rows whose digest is `rows`, unless the disk
    /// has them.
    pub fn attach(
        &mut self,
        cx: &mut Cx,
        policy: &Decoder,
        rows: u32,
        compute: impl FnOnce(&mut Cx, &Decoder) -> Result<Vec<f32>>,
    ) -> Result<()> {
        if self.keys.free {
            return Ok(());
        }
        if self.keys.sync.is_some() && policy.adapter.is_some() {
            let message = "sync_ref_model = true: the reference of an adapter is the base, which stays; train all weights";
            return Err(Error::Config(message.into()));
        }
        let other = match &self.keys.folder {
            Some(name) => Some(load(cx, policy, name, "ref_model", self.keys.longest)?),
            None => None,
        };
        if !self.keys.precompute {
            self.model = Some(match other {
                Some(model) => model,
                None => policy.reference(cx)?,
            });
            return Ok(());
        }
        let model = other.as_ref().unwrap_or(policy);
        let name = format!("ref_log_probs-{:08x}{rows:08x}.f32", weights_digest(cx, model)?);
        let path = self.keys.output.join(name);
        if path.is_file() {
            eprintln!("the reference's log-probs are read from {}", path.display());
            self.stored = Some(read_floats(&path)?);
            return Ok(());
        }
        let values = compute(cx, model)?;
        fsio::atomic_write(&path, bytemuck::cast_slice(&values))?;
        self.stored = Some(values);
        Ok(())
    }

    /// Moves the reference towards the policy where it is time to.
    pub fn stepped(&mut self, policy: &Decoder, done: u64) -> Result<()> {
        let (Some((alpha, every)), Some(model)) = (self.keys.sync, &self.model) else {
            return Ok(());
        };
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

    /// The weights of a reference that moves, for a checkpoint.
    pub fn state(&self) -> Result<Vec<(String, Vec<u8>)>> {
        let (Some(_), Some(model)) = (self.keys.sync, &self.model) else { return Ok(Vec::new()) };
        let mut bytes = Vec::with_capacity(4 * model.params.count());
        for i in 0..model.params.specs.len() {
            bytes.extend_from_slice(bytemuck::cast_slice(&model.params.weight_view(i)?.to_f32()?));
        }
        Ok(vec![(STATE.into(), bytes)])
    }

    pub fn restore(&mut self, dir: &Path) -> Result<()> {
        let (Some(_), Some(model)) = (self.keys.sync, &self.model) else { return Ok(()) };
        let path = dir.join(STATE);
        let values = read_floats(&path)?;
        if values.len() != model.params.count() {
            let message =
                format!("has {} values, the model {}", values.len(), model.params.count());
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

/// A frozen model of `policy`'s vocabulary, from the folder (or hub name) that the key `key` names.
pub fn load(cx: &Cx, policy: &Decoder, name: &str, key: &str, longest: usize) -> Result<Decoder> {
    let dir = resolve_model(name)?;
    let model = Decoder::folder(&dir)?.set(ParamSetId::Reference).positions(longest);
    let config = model.config();
    if config.task != policy.config.task {
        let message =
            format!("{key}: holds {:?}, the model is {:?}", config.task, policy.config.task);
        return Err(Error::model(&dir, message));
    }
    if config.vocab_size != policy.config.vocab_size {
        let (theirs, ours) = (config.vocab_size, policy.config.vocab_size);
        let message = format!(
            "{key}: has a vocabulary of {theirs} tokens, the model one of {ours}: their log-probs cannot be compared; \
             give a folder of the same family and tokenizer"
        );
        return Err(Error::model(&dir, message));
    }
    model.build(cx)
}

/// A digest of everything that a model's log-probs follow from: its weights, storage type and kind
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

fn read_floats(path: &Path) -> Result<Vec<f32>> {
    let bytes = fsio::read(path)?;
    match bytes.len() % 4 {
        0 => Ok(bytes
            .chunks_exact(4)
            .map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]))
            .collect()),
        _ => Err(Error::checkpoint(path, format!("has {} bytes, no whole numbers", bytes.len()))),
    }
}
