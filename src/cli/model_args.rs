//! The arguments and the output that the commands on one model share. Layer 9.
//!
//! Invariant: `--model`, `--adapter`, `--device` and `--dtype` mean the same in all of them.

use std::io::Write;
use std::path::PathBuf;

use super::Where;
use crate::autograd::Cx;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::open::open_model;

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
