//! Selects the modules that an adapter is applied to, by PEFT's rules for names, patterns, ranks
//! and alphas. Layer 5.
//!
//! Invariant: a target that matches nothing is an error that lists similar names; nothing is
//! skipped silently.

use regex::Regex;

use super::config::Targets;
use crate::error::{Error, Result, nearest};
use crate::model::layout::{ModelConfig, Task};
use crate::model::specs::Proj;

/// A projection, by layer.
pub type Module = (usize, Proj);

/// `model.layers.0.self_attn.q_proj`
pub fn module_name(model: &ModelConfig, (layer, proj): Module) -> String {
    format!("model.layers.{layer}.{}", model.module(proj))
}

/// Names of the modules before and after the blocks.
pub const EMBEDDING: &str = "model.embed_tokens";
pub const HEAD: &str = "lm_head";

/// The modules that an adapter is applied to.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct BoundModules {
    /// Ordered by layer.
    pub projections: Vec<Module>,
    pub embedding: bool,
    pub head: bool,
}

/// Selects the modules that match `targets` but neither `excluded` nor `saved`, only in `layers` if
/// given.
#[derive(Clone, Copy)]
pub struct TargetRules<'a> {
    pub targets: &'a Targets,
    pub excluded: Option<&'a Targets>,
    pub layers: Option<&'a [usize]>,
    /// `modules_to_save`: fully trained modules get no adapter.
    pub saved: &'a [String],
}

/// Returns the selected modules. Errors: an invalid pattern, a target that exists in no layer, no
/// module selected.
pub fn bound(rules: &TargetRules, config: &ModelConfig) -> Result<BoundModules> {
    let TargetRules { targets, excluded, layers, saved } = *rules;
    let projections = (0..config.num_layers)
        .flat_map(|layer| config.projections(layer).iter().map(move |proj| Some((layer, *proj))));
    // A classifier has no head.
    let ends = 1 + usize::from(config.task == Task::CausalLm);
    let all: Vec<Option<Module>> = projections.chain(vec![None; ends]).collect();
    if let Some(bad) = layers.into_iter().flatten().find(|l| **l >= config.num_layers) {
        return Err(Error::Config(format!(
            "layers_to_transform: there is no layer {bad}; the model has {} layers",
            config.num_layers
        )));
    }
    let mut known: Vec<String> = all.iter().flatten().map(|m| module_name(config, *m)).collect();
    let blocks = known.len();
    known.extend([EMBEDDING, HEAD].into_iter().take(ends).map(String::from));
    let is = |name: &str, target: &str| name == target || name.ends_with(&format!(".{target}"));
    let out: Vec<bool> = match excluded {
        None => vec![false; all.len()],
        Some(Targets::AllLinear) => vec![true; all.len()],
        Some(Targets::Names(names)) => {
            known.iter().map(|name| names.iter().any(|t| is(name, t))).collect()
        }
        Some(Targets::Pattern(pattern)) => {
            let regex = whole(pattern)
                .map_err(|e| Error::Config(format!("exclude_modules: {pattern}: {e}")))?;
            known.iter().map(|name| regex.is_match(name)).collect()
        }
    };
    let whole_part = |name: &str, part: &str| format!(".{name}.").contains(&format!(".{part}."));
    let fits: Vec<bool> = match targets {
        // PEFT excludes the output layer; an embedding is not linear.
        Targets::AllLinear => all.iter().map(Option::is_some).collect(),
        Targets::Pattern(pattern) => {
            let regex = whole(pattern)
                .map_err(|e| Error::Config(format!("lora_target_modules: {pattern}: {e}")))?;
            known.iter().map(|name| regex.is_match(name)).collect()
        }
        Targets::Names(names) => {
            let lost: Vec<&String> =
                names.iter().filter(|t| !known.iter().any(|n| is(n, t))).collect();
            if !lost.is_empty() {
                return Err(Error::Config(unbound(&lost, config)));
            }
            known.iter().map(|name| names.iter().any(|t| is(name, t))).collect()
        }
    };
    let is_bound = |i: &usize| {
        let in_layers = match all[*i] {
            Some((layer, _)) => layers.is_none_or(|l| l.contains(&layer)),
            None => layers.is_none() && !saved.iter().any(|m| whole_part(&known[*i], m)),
        };
        fits[*i] && !out[*i] && in_layers
    };
    let modules: Vec<usize> = (0..all.len()).filter(is_bound).collect();
    if modules.is_empty() {
        return Err(Error::Config(format!(
            "the adapter matches no module: target_modules {targets:?}, layers {layers:?}; \
             modules are named like {}",
            known.first().map(String::as_str).unwrap_or("model.layers.0.self_attn.q_proj")
        )));
    }
    Ok(BoundModules {
        projections: modules.iter().filter_map(|i| all[*i]).collect(),
        embedding: modules.contains(&blocks),
        head: modules.contains(&(blocks + 1)),
    })
}

fn unbound(lost: &[&String], config: &ModelConfig) -> String {
    let mut short: Vec<&str> = Vec::new();
    for proj in config.all_projections() {
        let name = config.short_module(proj);
        if !short.contains(&name) {
            short.push(name); // two modules may have the same suffix
        }
    }
    short.push("embed_tokens");
    if config.task == Task::CausalLm {
        short.push(HEAD);
    }
    let one = |name: &&String| {
        if let Some(own) = config.renamed(name) {
            return format!(
                "{name} is called {own} in {}; use that name",
                config.family.model_type
            );
        }
        let near = nearest(name, short.iter().copied());
        match near {
            _ if config.family.fused_projections && split(name).is_some() => format!(
                "{name} is not a module of {}: it is part of {}; use that name",
                config.family.model_type,
                split(name).unwrap_or_default()
            ),
            _ if name.as_str() == HEAD => {
                "lm_head: the model is a classifier and has none; score is trained fully".into()
            }
            Some(near) => format!("no layer has a module {name}; did you mean {near}?"),
            None => {
                format!("no layer has a module {name}; use {}, or all-linear", short.join(", "))
            }
        }
    };
    format!("lora_target_modules: {}", lost.iter().map(one).collect::<Vec<_>>().join("\n"))
}

/// Returns the fused module that contains a projection.
fn split(name: &str) -> Option<&'static str> {
    match name {
        "q_proj" | "k_proj" | "v_proj" => Some("qkv_proj"),
        "gate_proj" | "up_proj" => Some("gate_up_proj"),
        _ => None,
    }
}

/// Returns the value of the first pattern that matches the end of a module's name, as PEFT does for
/// `rank_pattern` and `alpha_pattern`.
pub fn by_pattern(patterns: &[(String, f64)], module: &str) -> Result<Option<f64>> {
    for (pattern, value) in patterns {
        let regex = whole(&format!("(.*\\.)?({pattern})"))
            .map_err(|e| Error::Config(format!("rank_pattern, alpha_pattern: {pattern}: {e}")))?;
        if regex.is_match(module) {
            return Ok(Some(*value));
        }
    }
    Ok(None)
}

/// Compiles a regular expression that may match anywhere in a parameter's name.
pub fn search(pattern: &str) -> Result<Regex> {
    Regex::new(pattern).map_err(|e| Error::Config(format!("{pattern}: {e}")))
}

/// Compiles a regular expression that must match the whole text.
pub fn whole(pattern: &str) -> Result<Regex, regex::Error> {
    Regex::new(&format!("^(?:{pattern})$"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::adapter::config::AdapterConfig;
    use serde_json::json;
    use std::path::Path;

    /// PEFT 0.19.1's `check_target_module_exists`: a name excludes itself and modules that end with
    /// it; a string is a pattern for the whole name.
    #[test]
    fn excluded_modules_are_those_that_peft_excludes() {
        let model = ModelConfig::load(Path::new("tests/fixtures/sft/model")).unwrap();
        let count = |exclude: serde_json::Value| {
            let raw = json!({
                "peft_type": "LORA", "target_modules": "all-linear", "exclude_modules": exclude,
            });
            let raw = raw.as_object().unwrap().clone();
            let config = AdapterConfig::from_json(Path::new("adapter_config.json"), raw).unwrap();
            assert_eq!(config.to_json()["exclude_modules"], exclude);
            let excluded = config.excluded().unwrap();
            let rules = TargetRules {
                targets: &Targets::AllLinear,
                excluded: excluded.as_ref(),
                layers: None,
                saved: &[],
            };
            bound(&rules, &model).map(|modules| modules.projections.len())
        };
        let (all, layers) = (7 * model.num_layers, model.num_layers);
        assert_eq!(count(json!(null)).unwrap(), all);
        assert_eq!(count(json!(["k_proj"])).unwrap(), all - layers);
        assert_eq!(count(json!(["model.layers.0.self_attn.k_proj", "proj"])).unwrap(), all - 1);
        assert_eq!(count(json!(r".*\.mlp\..*")).unwrap(), all - 3 * layers);
        assert_eq!(count(json!("k_proj")).unwrap(), all, "a pattern is of the whole name");
        assert!(count(json!(".*")).is_err());
    }
}
