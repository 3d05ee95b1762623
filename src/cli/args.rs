//! The arguments and the output that commands share. Layer 9.
//!
//! Invariant: `--model`, `--adapter`, `--device`, `--dtype` and `KEY=VALUE` mean the same in every
//! command.

use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use crate::autograd::Cx;
use crate::config::{self, Section};
use crate::device::{self, DType, Device};
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::open::open_model;

/// Where to run and in which storage type.
#[derive(clap::Args, Clone)]
pub struct Where {
    /// auto, cuda or cpu; auto takes the GPU where there is one
    #[arg(long, default_value = "auto")]
    pub device: String,
    /// auto, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU
    #[arg(long, default_value = "auto")]
    pub dtype: String,
}

impl Where {
    /// The device, announced on stderr, and a context on it.
    pub fn open(&self) -> Result<Cx> {
        let device = device::open(&self.device)?;
        let dtype = storage(&self.dtype, &device)?;
        eprintln!("device: {}, {}", device.name(), dtype.name());
        Cx::new(device, dtype)
    }
}

/// The storage type that `--dtype` means on a device.
pub fn storage(dtype: &str, device: &Arc<dyn Device>) -> Result<DType> {
    match dtype {
        "auto" => Ok(device.capabilities().dtype),
        "float32" => Ok(DType::F32),
        "bfloat16" => Ok(DType::BF16),
        other => Err(Error::Config(format!("dtype is auto, float32 or bfloat16, not \"{other}\""))),
    }
}

/// Moves the keys among `files` to `keys`: an argument that takes several files also takes the keys
/// that follow it. A key has a `=` and names no existing file.
pub fn part_keys(files: &mut Vec<PathBuf>, keys: &mut Vec<String>) {
    let is_key =
        |path: &PathBuf| !path.exists() && path.to_str().is_some_and(|text| text.contains('='));
    let (found, rest): (Vec<PathBuf>, Vec<PathBuf>) =
        std::mem::take(files).into_iter().partition(is_key);
    *files = rest;
    keys.splice(0..0, found.iter().map(|key| key.display().to_string()));
}

/// Reads `keys` into `sections` and prints what [`config::load`] notes.
pub fn read_keys(sections: &mut [&mut dyn Section], keys: &[String]) -> Result<()> {
    for note in config::load(sections, None, keys)? {
        eprintln!("note: {note}");
    }
    Ok(())
}

/// Which model, and where it runs.
#[derive(clap::Args)]
pub struct ModelArgs {
    /// model folder, or a hub name in the local cache
    #[arg(long)]
    pub model: String,
    /// adapter folder
    #[arg(long)]
    pub adapter: Option<PathBuf>,
    #[command(flatten)]
    pub on: Where,
}

impl ModelArgs {
    /// The folder that `--model` names.
    pub fn dir(&self) -> Result<PathBuf> {
        resolve_model(&self.model)
    }

    /// The model of [`ModelArgs::dir`] with its adapter, on its device.
    pub fn open(&self) -> Result<(Cx, Decoder)> {
        let cx = self.on.open()?;
        let model = open_model(&cx, &self.dir()?, self.adapter.as_deref())?;
        Ok((cx, model))
    }
}

/// Lines for `--output`, or for standard output where there is none.
pub struct OutputLines {
    path: PathBuf,
    writer: Box<dyn Write>,
}

impl OutputLines {
    pub fn open(path: &Option<PathBuf>) -> Result<OutputLines> {
        let writer: Box<dyn Write> = match path {
            Some(path) => Box::new(std::fs::File::create(path).map_err(|e| Error::io(path, e))?),
            None => Box::new(std::io::stdout().lock()),
        };
        Ok(OutputLines { path: path.clone().unwrap_or("stdout".into()), writer })
    }

    pub fn write(&mut self, line: &str) -> Result<()> {
        writeln!(self.writer, "{line}").map_err(|e| Error::io(&self.path, e))
    }
}
