//! Arguments and output that commands share. Layer 9.
//!
//! Invariant: `--model`, `--adapter`, `--device`, `--dtype` and `KEY=VALUE` have the same meaning
//! in every command.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Arc;

use crate::autograd::Cx;
use crate::config::value::{Given, Value};
use crate::config::{
    self, DataOptions, DeviceChoice, Dtype, PeftConfig, Section, TemplateOptions, TrainingConfig,
};
use crate::data::read::{FolderSplit, WantedFields, read};
use crate::data::render::ModelText;
use crate::data::rows::Row;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::hub::resolve_model;
use crate::model::open::open_stored;
use crate::observer::Terminal;
use crate::observer::output::{note_line, print_line};
use crate::train::tuning::scheme;

/// Where to run and in which storage type.
#[derive(clap::Args, Clone)]
pub struct Where {
    /// auto, cuda or cpu; auto takes the GPU if there is one
    #[arg(long, default_value = "auto", value_parser = choice::<DeviceChoice>)]
    pub device: DeviceChoice,
    /// auto, float32 or bfloat16; auto is bfloat16 on a GPU and float32 on a CPU
    #[arg(long, default_value = "auto", value_parser = choice::<Dtype>)]
    pub dtype: Dtype,
}

impl Where {
    /// The same values as options of a run.
    pub fn options(&self) -> TrainingConfig {
        TrainingConfig { device: self.device, dtype: self.dtype, ..TrainingConfig::default() }
    }

    /// A context on the device, which is reported on stderr.
    pub fn open(&self) -> Result<Cx> {
        Cx::open(&self.options(), Arc::new(Terminal::default()))
    }
}

/// Parses an argument like an option of type `T`.
pub fn choice<T: Value>(text: &str) -> std::result::Result<T, String> {
    T::read(&Given::Text(text.into()))
}

/// Moves the options among `files` to `keys`: an argument with several files also collects the
/// options that follow it. An option contains `=` and is not the name of an existing file.
pub fn part_keys(files: &mut Vec<PathBuf>, keys: &mut Vec<String>) {
    let is_key =
        |path: &PathBuf| !path.exists() && path.to_str().is_some_and(|text| text.contains('='));
    let (found, rest): (Vec<PathBuf>, Vec<PathBuf>) =
        std::mem::take(files).into_iter().partition(is_key);
    *files = rest;
    keys.splice(0..0, found.iter().map(|key| key.display().to_string()));
}

/// Reads `keys` into `sections` and prints the notes of [`config::load`].
pub fn read_keys(sections: &mut [&mut dyn Section], keys: &[String]) -> Result<()> {
    for note in config::load(sections, None, keys)? {
        note_line(format_args!("note: {note}"));
    }
    Ok(())
}

/// Reads the rows of `--data` with all their columns. Prints what was read and dropped.
pub fn read_data(files: &[PathBuf], split: FolderSplit, options: &DataOptions) -> Result<Vec<Row>> {
    let read = read(files, split, options, &WantedFields::All)?;
    read.told().iter().for_each(|text| note_line(format_args!("note: {text}")));
    Ok(read.rows)
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
    /// hold the linear layers in 4 bits (nf4), as load_in_4bit trains on them
    #[arg(long, conflicts_with = "load_in_8bit")]
    pub load_in_4bit: bool,
    /// hold the linear layers in 8 bits, as load_in_8bit trains on them
    #[arg(long)]
    pub load_in_8bit: bool,
    #[command(flatten)]
    pub on: Where,
}

impl ModelArgs {
    /// The folder of `--model`.
    pub fn dir(&self) -> Result<PathBuf> {
        resolve_model(&self.model)
    }

    /// The tokenizer and the chat templates of the model and its adapter.
    pub fn text(&self, options: &TemplateOptions) -> Result<ModelText> {
        ModelText::open(&self.dir()?, self.adapter.as_deref(), options)
    }

    /// The model of [`ModelArgs::dir`] with its adapter, on its device.
    pub fn open(&self) -> Result<(Cx, Decoder)> {
        let cx = self.on.open()?;
        let keys = PeftConfig {
            load_in_4bit: self.load_in_4bit,
            load_in_8bit: self.load_in_8bit,
            ..PeftConfig::default()
        };
        let model = open_stored(&cx, &self.dir()?, self.adapter.as_deref(), scheme(&keys))?;
        Ok((cx, model))
    }
}

/// Writes lines to `--output`, or to standard output without it.
pub struct OutputLines(Option<(PathBuf, File)>);

impl OutputLines {
    pub fn open(path: &Option<PathBuf>) -> Result<OutputLines> {
        let open = |path: &PathBuf| {
            let file = File::create(path).map_err(|e| Error::io(path, e))?;
            Ok((path.clone(), file))
        };
        let named = path.as_ref().filter(|path| path.as_os_str() != "-"); // "-" is standard output
        named.map(open).transpose().map(OutputLines)
    }

    pub fn write(&mut self, line: &str) -> Result<()> {
        match &mut self.0 {
            Some((path, file)) => writeln!(file, "{line}").map_err(|e| Error::io(&*path, e)),
            None => print_line(line),
        }
    }
}
