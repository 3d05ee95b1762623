//! `temper export`: writes a model folder, with an adapter merged, as a GGUF file. Layer 9.
//!
//! Invariant: the command succeeds only if the written file, read back, gives the folder's
//! log-probs and token ids.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::autograd::Cx;
use crate::cli::merge::difference;
use crate::cli::parsers::file;
use crate::data::tokenizer::Tokenizer;
use crate::device::DType;
use crate::device::cpu::Cpu;
use crate::error::{Error, Result};
use crate::fsio::{fsync_dir, parent, with_suffix};
use crate::gguf::blocks::GgufType;
use crate::gguf::convert::convert;
use crate::gguf::export::export;
use crate::gguf::same::differences;
use crate::model::adapter::config::AdapterConfig;
use crate::model::adapter::merge::merged_config;
use crate::model::hub::resolve_model;
use crate::model::open::open_model;
use crate::observer::output::note_line;
use crate::tensor::safetensors::HostDtype;

/// Write a model as a GGUF file for llama.cpp, and compare its log-probs with the folder's
#[derive(clap::Args)]
pub struct ExportArgs {
    /// the format to write (the only one)
    #[arg(long, required = true)]
    gguf: bool,
    /// model folder, a hub name in the local cache, or an adapter folder: its base is merged with it
    #[arg(value_name = "DIR")]
    model: String,
    /// the file to write
    #[arg(value_parser = file)]
    file: PathBuf,
    /// adapter folder, merged first
    #[arg(long)]
    adapter: Option<PathBuf>,
    /// f32, f16, bf16, q8_0 or q4_0: how matrices are stored; norms and biases are f32
    #[arg(long = "type", default_value = "f16")]
    stored: String,
    /// largest mean difference of log-probs; if absent, by type: f32 1e-4, f16 2e-3, bf16 0.05,
    /// q8_0 0.05, q4_0 no limit
    #[arg(long)]
    limit: Option<f32>,
    /// replace FILE
    #[arg(long)]
    overwrite: bool,
}

/// Types, and the most by which the log-probs of text may differ on average (the largest difference
/// belongs to an improbable token and grows with the text). f32: sums in another order, as after a
/// merge. f16 rounds a weight by 2^-12 of itself, bf16 by 2^-9, q8_0 by 1/254 of the largest weight
/// of its block of 32; docs/gguf.md has the measurements. The difference of q4_0 is only shown.
const TYPES: [(&str, GgufType, f32); 5] = [
    ("f32", GgufType::F32, 1e-4),
    ("f16", GgufType::F16, 2e-3),
    ("bf16", GgufType::BF16, 0.05),
    ("q8_0", GgufType::Q8_0, 0.05),
    ("q4_0", GgufType::Q4_0, f32::MAX),
];

/// Most tokens of a sequence whose log-probs are compared.
const LENGTH: usize = 48;

/// The texts on which log-probs are compared. Real text, since a model is far less certain about
/// random tokens, and rounding then has more effect.
const TEXTS: [&str; 4] = [
    "The history of computing began with simple counting devices. In 1936 a paper described a machine that could \
     compute anything computable, and the century that followed built it in many forms.",
    "Water boils at 100 degrees Celsius at sea level, but at a lower temperature on a mountain, because the pressure \
     of the air is lower there. That is why food takes longer to cook.",
    "def add(a, b):\n    return a + b\n\n\nfor i in range(10):\n    print(i, add(i, 2))\n",
    "Once upon a time there was a small village by the sea. The people who lived there went out to fish every \
     morning, and came home in the evening.",
];

/// The tokens of [`TEXTS`], at most `length` of each.
fn rows(tokenizer: &Tokenizer, length: usize) -> Result<Vec<Vec<u32>>> {
    let mut rows = TEXTS.iter().map(|t| tokenizer.encode(t, false)).collect::<Result<Vec<_>>>()?;
    rows.iter_mut().for_each(|row| row.truncate(length));
    if rows.iter().any(|row| row.len() < 2) {
        return Err(Error::Run(
            "the tokenizer has no tokens for English text to compare on".into(),
        ));
    }
    Ok(rows)
}

/// A text to compare the two tokenizers.
const PROBE: &str =
    "Hello, world!  It's 1936 and 3.14; naïve CAFÉ e\u{301} 日本語 🙂\n\n\tx = foo(a)\r\n   end ";

pub fn run(args: ExportArgs) -> Result<()> {
    let Some((_, dtype, limit)) = TYPES.iter().find(|t| t.0 == args.stored) else {
        let given = &args.stored;
        return Err(Error::Config(format!(
            "--type must be f32, f16, bf16, q8_0 or q4_0, not {given:?}"
        )));
    };
    if args.file.exists() && !args.overwrite {
        let shown = args.file.display();
        return Err(Error::Config(format!(
            "{shown} already exists; give another FILE, or --overwrite"
        )));
    }
    let (dir, adapter) = model_and_adapter(&args)?;
    let cx = Cx::new(Arc::new(Cpu::new()), DType::F32)?;
    let mut model = open_model(&cx, &dir, adapter.as_deref())?;
    model.ensure_positions(&cx, LENGTH)?;
    let tokenizer = Tokenizer::of_model(&dir, adapter.as_deref())?;
    // The file has another name until it was read back.
    let staged = Staged::new(&args.file)?;
    let notes = export(&cx, &model, &tokenizer, &staged.file, *dtype)?;
    let read = convert(&staged.file, &staged.folder, Some(HostDtype::F32))?;
    let off = differences(&merged_config(&model), &read.config);
    if !off.is_empty() {
        return Err(Error::Run(format!(
            "a GGUF file cannot represent this model, so nothing was written:\n  {}",
            off.join("\n  ")
        )));
    }
    check_tokens(&tokenizer, &staged.folder)?;
    let window = model.config.sliding_window.iter().flatten().min().copied();
    let length = window.map_or(LENGTH, |w| w.clamp(2, LENGTH));
    let off = difference(cx, &model, &staged.folder, &rows(&tokenizer, length)?)?;
    let limit = args.limit.unwrap_or(*limit);
    if off.mean.is_nan() || off.mean > limit {
        let failed = with_suffix(&args.file, ".failed");
        std::fs::rename(&staged.file, &failed).map_err(|e| Error::io(&failed, e))?;
        return Err(Error::Run(format!(
            "the file's log-probs are off by {:.2e} on average (limit {limit:.0e}), {:.2e} at \
             most; the file was renamed to {}. Use a --type with more bits, or a higher --limit \
             if that is close enough",
            off.mean,
            off.largest,
            failed.display()
        )));
    }
    let bytes = std::fs::metadata(&staged.file).map_or(0, |m| m.len());
    std::fs::rename(&staged.file, &args.file).map_err(|e| Error::io(&args.file, e))?;
    fsync_dir(parent(&args.file))?;
    for note in notes {
        note_line(format_args!("note: {note}"));
    }
    note_line(format_args!(
        "read back: log-probs differ by {:.1e} on average and {:.1e} at most from the folder's; wrote {} ({})",
        off.mean,
        off.largest,
        args.file.display(),
        crate::fsio::size_text(bytes)
    ));
    Ok(())
}

/// The folder of the base, and the adapter on it.
fn model_and_adapter(args: &ExportArgs) -> Result<(PathBuf, Option<PathBuf>)> {
    let given = Path::new(&args.model);
    let is_adapter =
        given.join("adapter_config.json").is_file() && !given.join("config.json").exists();
    if !is_adapter {
        return Ok((resolve_model(&args.model)?, args.adapter.clone()));
    }
    if args.adapter.is_some() {
        return Err(Error::model(
            given,
            "is an adapter: give its base as DIR, or leave out --adapter",
        ));
    }
    let base = AdapterConfig::load(given)?.base;
    if base.is_empty() {
        return Err(Error::model(
            given,
            "names no base (base_model_name_or_path); give the base as DIR and this folder as \
             --adapter",
        ));
    }
    Ok((resolve_model(&base)?, Some(given.to_path_buf())))
}

/// The file and folder of the check, beside the requested file.
struct Staged {
    file: PathBuf,
    folder: PathBuf,
}

impl Staged {
    fn new(file: &Path) -> Result<Self> {
        let (staged, folder) = (with_suffix(file, ".unchecked"), with_suffix(file, ".check"));
        if folder.exists() {
            let message = "already exists, but the export needs this path to read its file back; \
                           remove it";
            return Err(Error::model(folder, message));
        }
        Ok(Staged { file: staged, folder })
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.file);
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

/// Error: the tokenizer of the file differs from the folder's.
fn check_tokens(tokenizer: &Tokenizer, folder: &Path) -> Result<()> {
    let back = Tokenizer::load(folder)?;
    for special in [false, true] {
        let (a, b) = (tokenizer.encode(PROBE, special)?, back.encode(PROBE, special)?);
        if a != b {
            let at = a.iter().zip(&b).position(|(a, b)| a != b).unwrap_or(a.len().min(b.len()));
            return Err(Error::Run(format!(
                "the file's tokenizer splits {PROBE:?} differently from token {at} on ({:?} in \
                 the file, {:?} in the folder); nothing was written",
                b.get(at..).unwrap_or_default(),
                a.get(at..).unwrap_or_default()
            )));
        }
    }
    if tokenizer.chat_template() != back.chat_template() || tokenizer.eos_id() != back.eos_id() {
        return Err(Error::Run(
            "the file's chat template or EOS differs from the folder's; nothing was written".into(),
        ));
    }
    Ok(())
}
