//! `temper merge`: merges an adapter into its base and writes a model folder. Layer 9.
//!
//! Invariant: the command succeeds only if the written folder gives the log-probs of the adapted
//! base.

use std::path::PathBuf;
use std::sync::Arc;

use serde_json::json;

use crate::autograd::Cx;
use crate::checkpoint::{MERGE_FILE, is_moved_away, prepare_output};
use crate::data::tokenizer::Tokenizer;
use crate::device::DType;
use crate::device::cpu::Cpu;
use crate::error::{Error, Result};
use crate::fsio::atomic_write;
use crate::model::adapter::Adapter;
use crate::model::adapter::merge::{mergeable, merged_config, merged_values};
use crate::model::batch::Sequence;
use crate::model::decoder::Decoder;
use crate::model::folder::write_folder;
use crate::model::hub::resolve_model;
use crate::observer::output::note_line;
use crate::ops::case::Rng;
use crate::tensor::safetensors::HostDtype;
use crate::train::state::parts_of;

/// Merge an adapter into its base model
///
/// The merge is computed in float32. The command succeeds only if the log-probs of the merged folder
/// agree with those of base and adapter.
#[derive(clap::Args)]
pub struct MergeArgs {
    /// model folder, or a hub name in the local cache
    #[arg(long)]
    model: String,
    /// adapter folder
    #[arg(long)]
    adapter: PathBuf,
    /// where the merged folder is written
    #[arg(long)]
    output: PathBuf,
    /// replace what --output holds
    #[arg(long)]
    overwrite: bool,
    /// float32 or bfloat16; the base's own if absent
    #[arg(long)]
    dtype: Option<String>,
}

/// The log-probs of the merged folder differ from the adapter's only by rounding. f32: sums of at
/// most some thousand terms in another order. Stored in bf16: each weight is off by up to 2^-9 of
/// itself, like those of the base.
const TOLERANCE: [(HostDtype, f32); 2] = [(HostDtype::F32, 1e-4), (HostDtype::BF16, 0.5)];

pub fn run(args: MergeArgs) -> Result<()> {
    let dir = resolve_model(&args.model)?;
    for (flag, input) in [("--model", &dir), ("--adapter", &args.adapter)] {
        if is_moved_away(&args.output, input) {
            return Err(Error::Config(format!(
                "{flag} {} is in --output, whose model would be replaced; give another --output",
                input.display()
            )));
        }
    }
    let cx = Cx::new(Arc::new(Cpu::new()), DType::F32)?;
    let base = Decoder::folder(&dir)?.positions(64).build(&cx)?;
    let adapter = Adapter::load(&cx, &args.adapter, &base.config, &base.params)?;
    mergeable(&adapter)?;
    let own = base.config.dtype.unwrap_or(HostDtype::F32);
    let model = base.with_adapter(Some(adapter))?;
    let dtype = match args.dtype.as_deref() {
        None => own,
        Some("float32") => HostDtype::F32,
        Some("bfloat16") => HostDtype::BF16,
        Some(other) => {
            return Err(Error::Config(format!("--dtype must be float32 or bfloat16, not {other}")));
        }
    };
    let out = prepare_output(&args.output, args.overwrite, false)?;
    let mut config = merged_config(&model);
    let tokenizer = Tokenizer::of_model(&dir, Some(&args.adapter))?;
    let parts = parts_of(&tokenizer, &mut config, Some(dtype))?;
    let values = &mut |spec: &_| dtype.encode(&merged_values(&cx, &model, spec)?);
    write_folder(
        out.path(),
        &config,
        &parts.tokenizer_files,
        parts.generation_config,
        dtype,
        values,
    )?;
    let off = difference(cx, &model, out.path(), &random_rows(model.config.vocab_size))?.largest;
    let limit = TOLERANCE.iter().find(|(d, _)| *d == dtype).map_or(TOLERANCE[1].1, |t| t.1);
    if off.is_nan() || off > limit {
        let _ = std::fs::rename(
            out.path().join("model.safetensors"),
            out.path().join("model.safetensors.failed"),
        );
        return Err(Error::Run(format!(
            "the merged folder's log-probs are off by {off:.2e} (limit {limit:.0e}); its weights were renamed to \
             model.safetensors.failed. Try --dtype float32, and check that --model is the adapter's base"
        )));
    }
    let made_of = json!({
        "model": args.model, "adapter": args.adapter, "temper": env!("CARGO_PKG_VERSION"),
    });
    atomic_write(out.path().join(MERGE_FILE), format!("{made_of:#}\n").as_bytes())?;
    out.discard_overwritten()?;
    note_line(format_args!(
        "log-probs differ by {off:.1e} at most from the adapter's; wrote {}",
        args.output.display()
    ));
    Ok(())
}

/// Four random sequences of 48 tokens.
fn random_rows(vocab: usize) -> Vec<Vec<u32>> {
    let mut rng = Rng(9);
    (0..4).map(|_| (0..48).map(|_| rng.below(vocab) as u32).collect()).collect()
}

/// The differences between the log-probs of `rows` under `model` and under the model in the folder.
pub fn difference(
    mut cx: Cx,
    model: &Decoder,
    dir: &std::path::Path,
    rows: &[Vec<u32>],
) -> Result<Difference> {
    let merged = Decoder::folder(dir)?.positions(64).build(&cx)?;
    let sequences: Vec<Sequence> = rows.iter().map(|ids| Sequence { ids, target: None }).collect();
    let (a, b) =
        (model.logps(&mut cx, &sequences)?.concat(), merged.logps(&mut cx, &sequences)?.concat());
    let off: Vec<f32> = a.iter().zip(&b).map(|(a, b)| (a - b).abs()).collect();
    let largest = off.iter().fold(0.0, |m: f32, d| if d.is_nan() { *d } else { d.max(m) });
    let mean = off.iter().map(|d| f64::from(*d)).sum::<f64>() / off.len().max(1) as f64;
    Ok(Difference { mean: mean as f32, largest })
}

/// Absolute differences between the log-probs of two models. NaN if any of them is NaN.
#[derive(Clone, Copy, Debug)]
pub struct Difference {
    pub mean: f32,
    pub largest: f32,
}
