//! Writes the whole state of a trainer to files and reads it back. Layer 8.
//!
//! Invariant: reading returns the bits that were written. model.safetensors has the dtype of the
//! original folder; if that is narrower than the trained values, optimizer.safetensors holds the
//! float values beside the moments.

use std::path::Path;

use serde_json::{Value, json};

use super::best::BestModel;
use super::{Means, Trainer};
use crate::checkpoint::CheckpointWriter;
use crate::data::jinja::Clock;
use crate::data::tokenizer::Tokenizer;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::fsio;
use crate::model::adapter;
use crate::model::adapter::folder::SavedParam;
use crate::model::folder::{self, NamedFiles, write_folder};
use crate::model::layout::{ModelConfig, Task};
use crate::model::params::ParamSet;
use crate::optim::state::Moments;
use crate::rollout::stop::stop_ids;
use crate::tensor::Tensor;
use crate::tensor::safetensors::{HostDtype, SafeFolder, TensorSpec};

/// The state of a run outside the trainer: counters of the log and the best evaluation.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RunState {
    pub num_tokens: u64,
    pub means: Means,
    pub best: BestModel,
}

/// The parts of a model folder besides the weights.
#[derive(Clone, Debug, Default)]
pub struct FolderParts {
    pub tokenizer_files: NamedFiles,
    pub generation_config: Option<serde_json::Map<String, Value>>,
    pub dtype: Option<HostDtype>,
    /// When the run began, for `strftime_now` in a chat template; the same after a resume.
    pub started: Option<Clock>,
}

const MODEL: &str = "model.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const STATE: &str = "state.json";

impl Trainer {
    /// Writes the trained model: a whole model for transformers, in the dtype of the original
    /// folder (else float32), or an adapter for peft.
    pub fn write_model(&self, dir: &Path, parts: &FolderParts) -> Result<()> {
        let files = &parts.tokenizer_files;
        if let Some(adapter) = &self.model.adapter {
            return adapter::folder::write(dir, adapter, files, &mut |i| {
                self.optimizer.values(&adapter.params, i)
            });
        }
        let dtype = parts.dtype.unwrap_or(HostDtype::F32);
        write_folder(
            dir,
            &self.model.config,
            files,
            parts.generation_config.clone(),
            dtype,
            &mut |spec| {
                let params = &self.model.params;
                let i = params.by_name(&spec.name);
                let i =
                    i.ok_or_else(|| Error::op("params", format!("{} has no place", spec.name)))?;
                dtype.encode(&self.optimizer.values(params, i)?)
            },
        )
    }

    /// Adds model, optimizer and counters to a checkpoint.
    pub fn write_state(
        &self,
        writer: &mut CheckpointWriter,
        parts: &FolderParts,
        run: &RunState,
    ) -> Result<()> {
        let params = self.model.trained();
        let dtype = self.saved_dtype(parts);
        let (file, saved) = match &self.model.adapter {
            Some(adapter) => (adapter.weights_file(), adapter.saved()),
            None => (MODEL, whole(params)),
        };
        let tensor = |name: &str, i: usize, dtype| TensorSpec {
            name: name.to_string(),
            dtype,
            shape: params.specs[i].shape.clone(),
        };
        let model: Vec<TensorSpec> = saved
            .iter()
            .map(|s| TensorSpec { name: s.name.clone(), dtype, shape: s.shape.clone() })
            .collect();
        writer.add_safetensors(file, &model, &[("format", "pt")], &mut |at, _| {
            let values = saved[at].join(&mut |i| self.optimizer.values(params, i))?;
            finite(&saved[at].name, &values)?;
            dtype.encode(&values)
        })?;
        let mut tensors = Vec::new();
        let mut sources: Vec<(Option<&Tensor>, usize)> = Vec::new();
        let whole = self.whole_arenas();
        let mut arenas: Vec<(&str, Option<&Tensor>)> = Vec::new();
        if let Moments::F32 { m, v } = &self.optimizer.moments {
            arenas.extend([("m", Some(m)), ("v", Some(v))]);
        }
        if dtype != HostDtype::F32 {
            arenas.push(("master", None));
        }
        for (name, arena) in arenas {
            for i in params.trained() {
                tensors.push(tensor(
                    &format!("{name}.{}", params.specs[i].name),
                    i,
                    HostDtype::F32,
                ));
                sources.push((arena, i));
            }
        }
        for (name, t) in &whole {
            tensors.push(TensorSpec {
                name: name.to_string(),
                dtype: stored(t.dtype())?,
                shape: t.shape().to_vec(),
            });
        }
        writer.add_safetensors(OPTIMIZER, &tensors, &[], &mut |at, _| {
            let Some(&(arena, i)) = sources.get(at) else {
                return whole[at - sources.len()].1.to_bytes();
            };
            let values = match arena {
                Some(arena) => params
                    .state_view(arena, i)?
                    .map(|t| t.to_f32())
                    .transpose()?
                    .unwrap_or_default(),
                None => self.optimizer.values(params, i)?,
            };
            finite(&tensors[at].name, &values)?;
            HostDtype::F32.encode(&values)
        })?;
        match &self.model.adapter {
            Some(adapter) => writer.add_file(adapter::folder::CONFIG, &adapter.config_bytes())?,
            None => {
                let config = format!("{:#}\n", Value::Object(self.model.config.to_json(dtype)));
                writer.add_file("config.json", config.as_bytes())?;
            }
        }
        for (name, bytes) in &parts.tokenizer_files {
            writer.add_file(name, bytes)?;
        }
        if self.model.adapter.is_none()
            && let Some(map) = &parts.generation_config
        {
            let text = format!("{:#}\n", Value::Object(map.clone()));
            writer.add_file("generation_config.json", text.as_bytes())?;
        }
        let state = json!({
            "step": self.done, "num_tokens": run.num_tokens, "seed": self.config.seed, "rows": self.plan.rows(),
            "means": run.means.state(), "best": run.best.state(), "temper": env!("CARGO_PKG_VERSION"), "device": self.cx.device.name(),
            "dtype": self.cx.dtype.name(), "started": parts.started.map(|c| c.strftime(STARTED)),
        });
        writer.add_file(STATE, format!("{state:#}\n").as_bytes())
    }

    /// Restores a checkpoint from [`Trainer::write_state`]: weights, moments and step number. The
    /// trainer was made from the same config and data. Errors: the checkpoint has another number of
    /// rows (unless `resume_with_changes`) or another storage dtype.
    pub fn read_state(&mut self, dir: &Path) -> Result<RunState> {
        let path = dir.join(STATE);
        let state: Value = serde_json::from_slice(&fsio::read(&path)?)
            .map_err(|e| Error::checkpoint(&path, e.to_string()))?;
        let number = |key: &str| {
            state[key].as_u64().ok_or_else(|| Error::checkpoint(&path, format!("has no \"{key}\"")))
        };
        if number("rows")? != self.plan.rows() as u64 && !self.config.resume_with_changes {
            let message = format!(
                "was trained on {} rows, but the data has {}",
                number("rows")?,
                self.plan.rows()
            );
            return Err(Error::checkpoint(
                dir,
                message + "; give the same --data and options to resume",
            ));
        }
        if state["dtype"].as_str() != Some(self.cx.dtype.name()) {
            let message = format!(
                "was trained in {}, but this run uses {}",
                state["dtype"],
                self.cx.dtype.name()
            );
            return Err(Error::checkpoint(
                dir,
                message + "; resume on the same kind of device, or set dtype",
            ));
        }
        let (file, saved) = match &self.model.adapter {
            Some(adapter) => (adapter.weights_file(), adapter.saved()),
            None => (MODEL, whole(&self.model.params)),
        };
        let weights = SafeFolder::open_file(dir.join(file))?;
        let optimizer = SafeFolder::open_file(dir.join(OPTIMIZER))?;
        for (name, t) in self.whole_arenas() {
            let view = optimizer.get(name).filter(|v| v.bytes.len() == t.bytes());
            let message = || {
                format!(
                    "has no arena {name} of {} bytes; resume with the run's own optim",
                    t.bytes()
                )
            };
            t.upload(view.ok_or_else(|| Error::checkpoint(optimizer.path(), message()))?.bytes)?;
        }
        let params = self.model.trained();
        let of_model = |i: usize| {
            let Some(saved) = saved.iter().find(|s| s.holds(i)) else {
                return Err(Error::checkpoint(
                    dir,
                    format!("{} has no place", params.specs[i].name),
                ));
            };
            let values = read(&weights, &saved.name, saved.numel())?;
            Ok(saved.split(&values).into_iter().find(|p| p.0 == i).map(|p| p.1).unwrap_or_default())
        };
        // Untrained parameters of an adapter: the initial pairs of PiSSA.
        if self.model.adapter.is_some() {
            for i in (0..params.specs.len()).filter(|i| saved.iter().any(|s| s.holds(*i))) {
                params.store(i, &of_model(i)?)?;
            }
        }
        let mut arenas: Vec<(&str, &Tensor)> = Vec::new();
        if let Moments::F32 { m, v } = &self.optimizer.moments {
            arenas.extend([("m", m), ("v", v)]);
        }
        for i in params.trained() {
            let (name, len) = (&params.specs[i].name, params.specs[i].len());
            for &(moment, arena) in &arenas {
                let values = read(&optimizer, &format!("{moment}.{name}"), len)?;
                if let Some(view) = params.state_view(arena, i)? {
                    view.upload(&values)?;
                }
            }
            let master = format!("master.{name}");
            let float = match optimizer.get(&master) {
                Some(_) => read(&optimizer, &master, len)?,
                None => of_model(i)?,
            };
            if let Some(arena) = &self.optimizer.master
                && let Some(view) = params.state_view(arena, i)?
            {
                view.upload(&float)?;
            }
            params.store(i, &float)?;
        }
        self.model.refresh(&self.cx)?;
        self.done = number("step")?;
        let means = serde_json::from_value(state["means"].clone())
            .map_err(|e| Error::checkpoint(&path, format!("\"means\": {e}")))?;
        Ok(RunState {
            num_tokens: number("num_tokens")?,
            means: Means::from_state(means),
            best: BestModel::from_state(&state["best"]),
        })
    }

    /// The approximate size of a checkpoint in bytes.
    pub fn state_bytes(&self, parts: &FolderParts) -> u64 {
        let dtype = self.saved_dtype(parts);
        let master = if dtype == HostDtype::F32 { 0 } else { 4 };
        let params = self.model.trained();
        let moments = self.optimizer.moments.bytes();
        (params.count() * dtype.size().unwrap_or(4) + params.trained_count() * master + moments)
            as u64
    }

    /// Moments that are saved as whole arenas instead of by parameter: all kinds except F32.
    fn whole_arenas(&self) -> Vec<(&'static str, &Tensor)> {
        match &self.optimizer.moments {
            Moments::F32 { .. } => Vec::new(),
            other => other.named_tensors(),
        }
    }

    /// Adapters are saved in float32, in which peft trains them.
    fn saved_dtype(&self, parts: &FolderParts) -> HostDtype {
        if self.model.adapter.is_some() {
            HostDtype::F32
        } else {
            parts.dtype.unwrap_or(HostDtype::F32)
        }
    }
}

fn stored(dtype: DType) -> Result<HostDtype> {
    match dtype {
        DType::F32 => Ok(HostDtype::F32),
        DType::BF16 => Ok(HostDtype::BF16),
        DType::U8 => Ok(HostDtype::Other(safetensors::Dtype::U8)),
        other => Err(Error::op("checkpoint", format!("an arena of {}", other.name()))),
    }
}

/// Reads the values of a tensor of a checkpoint.
fn read(from: &SafeFolder, name: &str, len: usize) -> Result<Vec<f32>> {
    let view = from
        .get(name)
        .ok_or_else(|| Error::checkpoint(from.path(), format!("{name} is missing")))?;
    if view.len() != len {
        return Err(Error::checkpoint(
            from.path(),
            format!("{name} has {} values, not {len}", view.len()),
        ));
    }
    let mut values = vec![0.0; len];
    view.to_f32_into(&mut values)?;
    Ok(values)
}

/// Error: a value is NaN or infinite. Such a state is useless and must not replace a good one.
fn finite(name: &str, values: &[f32]) -> Result<()> {
    match values.iter().position(|v| !v.is_finite()) {
        Some(at) => Err(Error::Run(format!("{name} is {} at value {at}", values[at]))),
        None => Ok(()),
    }
}

/// The parameters of a model, one per tensor.
fn whole(params: &ParamSet) -> Vec<SavedParam> {
    params.specs.iter().enumerate().map(|(i, s)| SavedParam::whole(&s.name, &s.shape, i)).collect()
}

/// When the run of a checkpoint began. None: an older version that did not record it.
pub fn started(checkpoint: &Path) -> Result<Option<Clock>> {
    let path = checkpoint.join(STATE);
    let state: Value = serde_json::from_slice(&fsio::read(&path)?)
        .map_err(|e| Error::checkpoint(&path, e.to_string()))?;
    let Some(text) = state["started"].as_str() else { return Ok(None) };
    let clock = Clock::parse(text);
    clock
        .map(Some)
        .ok_or_else(|| Error::checkpoint(&path, format!("\"started\" is not a time: {text}")))
}

/// The parts for [`Trainer::write_model`] of a model trained with `tokenizer`. The generation
/// config gets the stop ids of training, and `config` the tokenizer's EOS.
pub fn parts_of(
    tokenizer: &Tokenizer,
    config: &mut ModelConfig,
    dtype: Option<HostDtype>,
) -> Result<FolderParts> {
    let mut generation = folder::generation_config(tokenizer.model_dir())?;
    if let (Task::CausalLm, Some(eos)) = (config.task, tokenizer.eos_id()) {
        let mut stop = stop_ids(tokenizer, config, &[])?;
        let read = match generation.as_ref().and_then(|map| map.get("eos_token_id")) {
            Some(Value::Array(ids)) => ids.iter().filter_map(Value::as_u64).collect(),
            Some(Value::Number(id)) => id.as_u64().into_iter().collect(),
            _ => config.eos.iter().map(|id| u64::from(*id)).collect::<Vec<_>>(),
        };
        if stop.iter().any(|id| !read.contains(&u64::from(*id))) {
            stop.retain(|id| *id != eos);
            stop.insert(0, eos);
            generation.get_or_insert_default().insert("eos_token_id".into(), json!(stop));
        }
        if !config.eos.contains(&eos) {
            config.eos = vec![eos];
        }
    }
    Ok(FolderParts {
        tokenizer_files: tokenizer.saved_files()?,
        generation_config: generation,
        dtype: dtype.filter(|d| matches!(d, HostDtype::F32 | HostDtype::F16 | HostDtype::BF16)),
        started: None,
    })
}

/// The format in which a checkpoint stores when the run began.
const STARTED: &str = "%Y-%m-%d %H:%M:%S";
