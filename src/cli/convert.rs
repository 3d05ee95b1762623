//! `temper convert`: converts a GGUF file to a model folder. Layer 9.
//!
//! Invariant: it writes a folder that the other commands can open, or nothing.

use std::path::PathBuf;

use crate::cli::parsers::file;
use crate::error::{Error, Result};
use crate::gguf::convert::convert;
use crate::observer::output::note_line;
use crate::tensor::safetensors::HostDtype;

/// Make a model folder from a GGUF file: weights, config, tokenizer and chat template
#[derive(clap::Args)]
pub struct ConvertArgs {
    /// the GGUF file
    #[arg(value_name = "FILE.gguf")]
    input: PathBuf,
    /// where the folder is written
    #[arg(value_parser = file)]
    dir: PathBuf,
    /// auto, f32, f16 or bf16; auto keeps every value: f16 or bf16 if the file holds nothing else,
    /// f32 for quantised types
    #[arg(long, default_value = "auto")]
    dtype: String,
}

pub fn run(args: ConvertArgs) -> Result<()> {
    let dtype = match args.dtype.as_str() {
        "auto" => None,
        "f32" | "float32" => Some(HostDtype::F32),
        "f16" | "float16" => Some(HostDtype::F16),
        "bf16" | "bfloat16" => Some(HostDtype::BF16),
        other => {
            return Err(Error::Config(format!(
                "--dtype must be auto, f32, f16 or bf16, not {other:?}"
            )));
        }
    };
    let held = ["config.json", "model.safetensors", "model.safetensors.index.json"];
    if let Some(name) = held.iter().find(|name| args.dir.join(name).exists()) {
        let shown = args.dir.display();
        return Err(Error::Config(format!(
            "{shown} already holds a model ({name}); give another folder, or remove it"
        )));
    }
    let done = convert(&args.input, &args.dir, dtype)?;
    let types: Vec<String> = done.types.iter().map(|(name, n)| format!("{n} {name}")).collect();
    let kept = if done.exact { "every value kept" } else { "values rounded" };
    let name = done.dtype.torch_name().unwrap_or_default();
    note_line(format_args!(
        "{}: {} layers, {} tokens; tensors: {}; written as {name}, {kept}",
        done.config.family.model_type,
        done.config.num_layers,
        done.config.vocab_size,
        types.join(", ")
    ));
    note_line(format_args!("wrote {}", args.dir.display()));
    Ok(())
}
