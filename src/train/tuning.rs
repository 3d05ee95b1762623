//! Selects what is trained: an adapter, the whole model, or all but the frozen parameters. Layer 8.
//!
//! Invariant: the plan and the run use the same functions, so they agree on which parameters have
//! gradients and moments.

use std::path::Path;

use crate::autograd::Cx;
use crate::config::PeftConfig;
use crate::data::tokenizer::Tokenizer;
use crate::error::{Error, Result};
use crate::model::adapter::Adapter;
use crate::model::adapter::config::{AdapterConfig, AdapterKind, pairs};
use crate::model::adapter::target::search;
use crate::model::decoder::Decoder;
use crate::model::params::Tuning;
use crate::ops::quant::Scheme;

/// The storage of a frozen base. None: the storage dtype.
pub fn scheme(keys: &PeftConfig) -> Option<Scheme> {
    match (keys.load_in_4bit, keys.load_in_8bit) {
        (true, _) => Some(Scheme::Nf4 { double: keys.use_bnb_nested_quant }),
        (_, true) => Some(Scheme::Int8),
        _ => None,
    }
}

/// Selects what is trained: an adapter (new, or loaded from `from`), the whole model, or all but
/// the frozen parameters.
pub fn prepare(
    cx: &Cx,
    mut model: Decoder,
    keys: &PeftConfig,
    from: Option<&Path>,
    dir: &Path,
    seed: u64,
) -> Result<Decoder> {
    if from.is_some() || keys.use_peft {
        let mut adapter = match from {
            Some(from) => Adapter::load(cx, from, &model.config, &model.params)?,
            None => {
                let mut config =
                    AdapterConfig::from_keys(keys, &model.config, &dir.display().to_string())?;
                if let (AdapterKind::Prompt(prompt), Some(text)) =
                    (&mut config.kind, &keys.prompt_tuning_init_text)
                {
                    prompt.init_ids = Tokenizer::load(dir)?.encode(text, true)?;
                }
                Adapter::new(cx, config, &model.config, &model.params, seed)?
            }
        };
        adapter.tune(keys.loraplus_lr_ratio)?;
        let mut model = model.with_adapter(Some(adapter))?;
        model.ensure_positions(cx, model.positions() + model.vocab().virtuals)?;
        return Ok(model);
    }
    let patterns = |items: &[String]| items.iter().map(|p| search(p)).collect::<Result<Vec<_>>>();
    let freeze = patterns(keys.freeze.as_deref().unwrap_or(&[]))?;
    let rates = pairs("lr_multipliers", &keys.lr_multipliers)?;
    let names: Vec<String> = rates.iter().map(|r| r.0.clone()).collect();
    let rate_patterns = patterns(&names)?;
    for (pattern, text) in
        freeze.iter().chain(&rate_patterns).zip(keys.freeze.iter().flatten().chain(&names))
    {
        if !model.params.specs.iter().any(|s| pattern.is_match(&s.name)) {
            let some =
                model.params.specs.iter().map(|s| s.name.as_str()).nth(1).unwrap_or_default();
            let message = format!(
                "freeze, lr_multipliers: \"{text}\" matches no parameter; they are named like {some}"
            );
            return Err(Error::Config(message));
        }
    }
    model.params.tune(|spec| Tuning {
        trainable: !freeze.iter().any(|p| p.is_match(&spec.name)),
        lr_scale: rate_patterns
            .iter()
            .position(|p| p.is_match(&spec.name))
            .map_or(1.0, |i| rates[i].1 as f32),
    });
    if model.params.trained_count() == 0 {
        return Err(Error::Config("freeze: no parameter is left to train; freeze fewer".into()));
    }
    Ok(model)
}
