//! Adapters: separate parameters beside a frozen model. Layer 5.
//!
//! Invariant: the base's weights are never written. An adapter is a [`ParamSet`] (with its own
//! arena, gradients and moments) and an *adapter site* for each group of projections that share an
//! input, which holds what to add to their product. The decoder uses the site and does not know the
//! kind of adapter. Fully trained modules (`modules_to_save`, biases) are copies in the adapter's
//! set.

pub mod bottleneck;
pub mod config;
pub mod folder;
mod init;
pub mod merge;
mod pissa;
pub mod target;

use std::collections::HashSet;

use bottleneck::Bottleneck;
use config::{AdapterConfig, AdapterKind, LoraConfig};
use target::{BoundModules, EMBEDDING, HEAD, TargetRules, bound, by_pattern, module_name};

use crate::autograd::{Cx, add_into};
use crate::config::LoraBias;
use crate::device::Layout;
use crate::error::{Error, Result, nearest};
use crate::model::layout::ModelConfig;
use crate::model::params::{ParamSet, Tuning, fused_role};
use crate::model::specs::{BottleneckSite, ParamSpec, Proj, Role, expected_params};
use crate::ops::head_terms::HeadPair;
use crate::ops::lora::{Pairs, Segment};
use crate::ops::matmul::product;
use crate::ops::scale::{constant, row_norms};
use crate::tensor::{ParamSetId, Tensor};

/// PEFT's prefix of all parameter names.
pub const PREFIX: &str = "base_model.model.";

#[derive(Clone)]
pub struct Adapter {
    pub config: AdapterConfig,
    pub params: ParamSet,
    sites: Vec<[AdapterSite; Proj::LEADERS.len()]>,
    /// For each layer: after attention, after the MLP.
    bottlenecks: Vec<[Option<Bottleneck>; 2]>,
    /// LoRA on the token embedding and on the head.
    pub embedding: Option<EmbeddingPair>,
    pub head: Option<HeadPair>,
}

/// LoRA on the token embedding: a token's row of A, scaled, times the transpose of B.
#[derive(Clone)]
pub struct EmbeddingPair {
    /// [vocab, r] real
    pub a: Tensor,
    /// [hidden, r] real
    pub b: Tensor,
    pub scale: f32,
}

/// The contribution of an adapter to projections that share an input.
#[derive(Clone, Default)]
pub struct AdapterSite {
    /// IA3 on the input: one vector `[k]`.
    pub input_scale: Option<Tensor>,
    pub lora: Option<LoraSite>,
    /// IA3's output vectors or DoRA's magnitudes, each with its first column.
    pub output_scales: Vec<(usize, Tensor)>,
    /// F32 `[n]`: DoRA's norms of the rows of W + s B A, as of the last [`Adapter::refresh`]; 1
    /// where there is no LoRA.
    pub norm: Option<Tensor>,
}

#[derive(Clone)]
pub struct LoraSite {
    pub pairs: Pairs,
    pub scales: Vec<f32>,
    pub dropout: f32,
}

/// Returns the name in the base of a parameter that the adapter copies.
pub fn base_name(name: &str) -> String {
    name.strip_prefix(PREFIX).unwrap_or(name).replace(".base_layer.", ".")
}

impl Adapter {
    /// Creates an adapter for `base` with its initial values. Biases and modules to save are copied
    /// from the base.
    pub fn new(
        cx: &Cx,
        config: AdapterConfig,
        model: &ModelConfig,
        base: &ParamSet,
        seed: u64,
    ) -> Result<Adapter> {
        Adapter::in_set(cx, ParamSetId::Adapter, config, model, base, seed)
    }

    /// Like [`Adapter::new`], in another parameter set: for a model that is trained beside the one
    /// with the run's adapter. A score that the base lacks starts at zero.
    pub fn in_set(
        cx: &Cx,
        set: ParamSetId,
        config: AdapterConfig,
        model: &ModelConfig,
        base: &ParamSet,
        seed: u64,
    ) -> Result<Adapter> {
        let adapter = Adapter::zeros(cx, set, config, model)?;
        adapter.initialise(cx, model, base, seed)?;
        Ok(adapter)
    }

    /// Allocates the adapter's parameters, all zero, copies included; loading or [`Adapter::new`]
    /// fills them.
    fn zeros(
        cx: &Cx,
        set: ParamSetId,
        config: AdapterConfig,
        model: &ModelConfig,
    ) -> Result<Adapter> {
        if matches!(config.kind, AdapterKind::Bottleneck(_)) {
            bottleneck::check_norms(model)?;
        }
        let params = ParamSet::new(cx, set, adapter_params(&config, model)?)?;
        let (embedding, head) = ends(&config, &params)?;
        let (sites, bottlenecks) = (Vec::new(), Vec::new());
        let mut adapter = Adapter { config, params, sites, bottlenecks, embedding, head };
        adapter.tune(None)?;
        for layer in 0..model.num_layers {
            let mut sites: [AdapterSite; Proj::LEADERS.len()] = Default::default();
            for (site, leader) in sites.iter_mut().zip(Proj::LEADERS) {
                *site = adapter.build_site(cx, layer, leader, model)?;
            }
            adapter.sites.push(sites);
            if let AdapterKind::Bottleneck(config) = &adapter.config.kind {
                let wire = |place| Bottleneck::wire(cx, config, &adapter.params, layer, place);
                let both = [wire(BottleneckSite::Attention)?, wire(BottleneckSite::Mlp)?];
                adapter.bottlenecks.push(both);
            }
        }
        Ok(adapter)
    }

    /// Sets which parameters are trained and their learning rates: LoRA+'s ratio applies to B (and
    /// vectors, grouped as in PEFT).
    pub fn tune(&mut self, loraplus_lr_ratio: Option<f64>) -> Result<()> {
        let ratio = loraplus_lr_ratio.unwrap_or(1.0) as f32;
        let trained_biases: Option<Vec<String>> = match &self.config.kind {
            // Fused biases are copied as a whole; only those of layers with LoRA are trained.
            AdapterKind::Lora(c) if c.bias == LoraBias::LoraOnly => {
                let b = self.params.specs.iter().filter(|s| matches!(s.role, Role::LoraB(_)));
                Some(b.map(|s| s.name.replace(".lora_B.weight", ".base_layer.bias")).collect())
            }
            _ => None,
        };
        self.params.tune(|spec| Tuning {
            trainable: !matches!(spec.role, Role::InitialA(_) | Role::InitialB(_))
                && (!spec.role.is_bias()
                    || trained_biases.as_ref().is_none_or(|names| names.contains(&spec.name))),
            lr_scale: if matches!(spec.role, Role::LoraB(_) | Role::HeadB) || spec.shape.len() == 1
            {
                ratio
            } else {
                1.0
            },
        });
        Ok(())
    }

    pub fn site(&self, layer: usize, leader: Proj) -> Option<&AdapterSite> {
        let at = Proj::LEADERS.iter().position(|l| *l == leader)?;
        self.sites.get(layer).map(|s| &s[at])
    }

    /// Returns the bottleneck adapter at a position of a layer, if any.
    pub fn bottleneck(&self, layer: usize, place: BottleneckSite) -> Option<&Bottleneck> {
        self.bottlenecks
            .get(layer)
            .and_then(|b| b[usize::from(place == BottleneckSite::Mlp)].as_ref())
    }

    /// Whether the adapter is new and initially has no effect: then the reference of a preference
    /// or RL method is the model with the adapter switched off.
    pub fn starts_at_zero(&self) -> bool {
        let plain = match &self.config.kind {
            AdapterKind::Lora(c) => c.init != "false",
            AdapterKind::Ia3(_) => true,
            AdapterKind::Prompt(_) => false,
            AdapterKind::Bottleneck(c) => c.init == "mam_adapter",
        };
        plain && self.config.raw.is_empty()
    }

    /// Whether a tied head reads the embedding that the adapter trains.
    pub fn ties_head(&self) -> bool {
        self.config.tied && self.params.by_role(None, Role::Embed).is_some()
    }

    /// Number of parameters as PEFT counts them: without the pairs that PiSSA subtracts from the
    /// base.
    pub fn count(&self) -> usize {
        let counted = |s: &&ParamSpec| !matches!(s.role, Role::InitialA(_) | Role::InitialB(_));
        self.params.specs.iter().filter(counted).map(ParamSpec::len).sum()
    }

    pub fn dropout(&self) -> f32 {
        match &self.config.kind {
            AdapterKind::Lora(c) => c.dropout,
            _ => 0.0,
        }
    }

    /// Recomputes derived values: DoRA's row norms. Call it whenever the adapter's or the base's
    /// values change.
    pub fn refresh(&self, cx: &Cx, base: &ParamSet) -> Result<()> {
        for (layer, sites) in self.sites.iter().enumerate() {
            for (site, leader) in sites.iter().zip(Proj::LEADERS) {
                let (Some(norm), Some(lora)) = (&site.norm, &site.lora) else { continue };
                let weight = base.dense(cx, Some(layer), leader.role())?;
                for (segment, b) in lora.pairs.segments.iter().zip(&lora.pairs.b) {
                    let w = weight.rows(segment.from, segment.from + segment.cols)?;
                    let whole = merged(cx, &w, lora, segment, b)?;
                    norm.rows(segment.from, segment.from + segment.cols)?
                        .copy_from(&row_norms(cx, &whole)?)?;
                }
            }
        }
        Ok(())
    }

    fn build_site(
        &self,
        cx: &Cx,
        layer: usize,
        leader: Proj,
        model: &ModelConfig,
    ) -> Result<AdapterSite> {
        let mut site = AdapterSite::default();
        let fused = |role| self.params.fused(Some(layer), role);
        // Each projection, with its columns in the site's output.
        let mut columns = Vec::new();
        let mut width = 0;
        for proj in model.group(leader) {
            let (cols, _) = model.proj_shape(proj);
            columns.push((proj, width, cols));
            width += cols;
        }
        for (proj, from, _) in &columns {
            site.output_scales.extend(fused(Role::Magnitude(*proj))?.map(|s| (*from, s)));
            if let Some(vector) = fused(Role::Ia3(*proj))? {
                let vector = vector.reshape(&[vector.numel()])?;
                if self.scales_input(model.module(*proj)) {
                    site.input_scale = Some(vector);
                } else {
                    site.output_scales.push((*from, vector));
                }
            }
        }
        let AdapterKind::Lora(config) = &self.config.kind else { return Ok(site) };
        let (mut segments, mut b, mut scales) = (Vec::new(), Vec::new(), Vec::new());
        // PiSSA's frozen initial pairs are additional ranks after all trained ones.
        for role in [Role::LoraB as fn(Proj) -> Role, Role::InitialB] {
            for (proj, from, cols) in columns.iter().copied() {
                let Some(pair) = fused(role(proj))? else { continue };
                let rank = pair.cols();
                let scale = scale(config, &module_name(model, (layer, proj)), rank)?;
                segments.push(Segment { from, cols, rank_from: scales.len(), rank, scale });
                scales.extend(vec![scale; rank]);
                b.push(pair);
            }
        }
        if let Some(a) = fused(Role::LoraA(leader))? {
            let scale = constant(cx, &scales)?;
            if config.use_dora {
                site.norm = Some(constant(cx, &vec![1.0; width])?);
            }
            site.lora = Some(LoraSite {
                pairs: Pairs { a, b, segments, scale },
                scales,
                dropout: config.dropout,
            });
        }
        Ok(site)
    }

    fn scales_input(&self, module: &str) -> bool {
        match &self.config.kind {
            AdapterKind::Ia3(c) => c.feedforward.iter().any(|f| module.ends_with(f.as_str())),
            _ => false,
        }
    }

    /// Disables dropout in training; the config stays unchanged.
    pub fn disable_dropout(&mut self) {
        self.sites
            .iter_mut()
            .flatten()
            .filter_map(|s| s.lora.as_mut())
            .for_each(|l| l.dropout = 0.0);
        self.head.iter_mut().for_each(|pair| pair.dropout = 0.0);
    }

    /// Returns a frozen copy with its own values, as the parameter set of the reference.
    pub fn reference(&self, cx: &Cx, model: &ModelConfig) -> Result<Adapter> {
        let copy = Adapter::zeros(cx, ParamSetId::Reference, self.config.clone(), model)?;
        copy.params.weights.copy_from(&self.params.weights)?;
        Ok(copy)
    }
}

/// Returns W + s B A for a segment's rows, F32, for merging and for DoRA's norms.
pub fn merged(
    cx: &Cx,
    w: &Tensor,
    lora: &LoraSite,
    segment: &Segment,
    b: &Tensor,
) -> Result<Tensor> {
    let whole = cx.float("merged weight", w.shape())?;
    add_into(cx, &whole, w, false)?;
    let rank = (segment.rank_from, segment.rank_from + segment.rank);
    let a = lora.pairs.a.rows(rank.0, rank.1)?;
    let delta = cx.float("merged weight", w.shape())?;
    product(cx, Layout::NN, &delta, b, &a, None, false)?;
    let s = lora.scales.get(segment.rank_from).copied().unwrap_or(1.0);
    crate::ops::add::axpy(cx, &whole, &delta, s)?;
    Ok(whole)
}

/// LoRA's scale: alpha / r, or alpha / sqrt(r) with rsLoRA.
fn scale(config: &LoraConfig, module: &str, rank: usize) -> Result<f32> {
    let alpha = by_pattern(&config.alpha_pattern, module)?.unwrap_or(config.alpha);
    let r = rank as f64;
    Ok((alpha / if config.use_rslora { r.sqrt() } else { r }) as f32)
}

/// LoRA's pairs outside the blocks.
fn ends(
    config: &AdapterConfig,
    params: &ParamSet,
) -> Result<(Option<EmbeddingPair>, Option<HeadPair>)> {
    let AdapterKind::Lora(lora) = &config.kind else { return Ok((None, None)) };
    let pair = |a, b| Ok::<_, Error>(params.fused(None, a)?.zip(params.fused(None, b)?));
    let embedding = match pair(Role::EmbedA, Role::EmbedB)? {
        Some((a, b)) => Some(EmbeddingPair { scale: scale(lora, EMBEDDING, b.cols())?, a, b }),
        None => None,
    };
    let head = match pair(Role::HeadA, Role::HeadB)? {
        Some((a, b)) => {
            let scale = scale(lora, HEAD, b.cols())?;
            Some(HeadPair { a, b, scale, dropout: lora.dropout })
        }
        None => None,
    };
    Ok((embedding, head))
}

/// LoRA's parameters outside the blocks: A and B of each pair.
fn end_params(
    config: &LoraConfig,
    bound: &BoundModules,
    model: &ModelConfig,
) -> Result<Vec<[ParamSpec; 2]>> {
    if (bound.embedding || bound.head) && (config.use_dora || config.pissa().is_some()) {
        let message = "lora_target_modules: embed_tokens and lm_head support only plain LoRA; \
                       leave them out, or leave out use_dora and init_lora_weights=pissa";
        return Err(Error::Config(message.into()));
    }
    let spec = |name: &str, part: &str, role, shape: [usize; 2]| ParamSpec {
        name: format!("{PREFIX}{name}.{part}"),
        shape: shape.into(),
        role,
        layer: None,
    };
    let (vocab, hidden) = (model.vocab_size, model.hidden_size);
    let mut pairs = Vec::new();
    if bound.embedding {
        let r = rank(config, EMBEDDING)?;
        pairs.push([
            spec(EMBEDDING, "lora_embedding_A", Role::EmbedA, [vocab, r]),
            spec(EMBEDDING, "lora_embedding_B", Role::EmbedB, [hidden, r]),
        ]);
    }
    if bound.head {
        let r = rank(config, HEAD)?;
        pairs.push([
            spec(HEAD, "lora_A.weight", Role::HeadA, [r, hidden]),
            spec(HEAD, "lora_B.weight", Role::HeadB, [vocab, r]),
        ]);
    }
    Ok(pairs)
}

/// Returns a module's rank.
fn rank(config: &LoraConfig, module: &str) -> Result<usize> {
    match by_pattern(&config.rank_pattern, module)?.map_or(config.r, |r| r as usize) {
        0 => Err(Error::Config(format!(
            "{module}: an adapter of rank 0 learns nothing; give at least 1"
        ))),
        rank => Ok(rank),
    }
}

/// Lists every parameter of an adapter under PEFT's names, in arena order: all A, then all B and
/// vectors, then copies.
pub fn adapter_params(config: &AdapterConfig, model: &ModelConfig) -> Result<Vec<ParamSpec>> {
    let mut first = Vec::new();
    let mut second = Vec::new();
    let excluded = config.excluded()?;
    let mut bias = LoraBias::None;
    match &config.kind {
        AdapterKind::Lora(c) => {
            bias = c.bias;
            let rules = TargetRules {
                targets: &c.targets,
                excluded: excluded.as_ref(),
                layers: c.layers.as_deref(),
                saved: &config.modules_to_save,
            };
            let bound = bound(&rules, model)?;
            for [a, b] in end_params(c, &bound, model)? {
                first.push(a);
                second.push(b);
            }
            for (layer, proj) in bound.projections {
                let name = module_name(model, (layer, proj));
                let (out, input) = model.proj_shape(proj);
                let rank = rank(c, &name)?;
                let spec = |part: &str, role, shape: &[usize]| ParamSpec {
                    name: format!("{PREFIX}{name}.{part}"),
                    shape: shape.to_vec(),
                    role,
                    layer: Some(layer),
                };
                first.push(spec("lora_A.weight", Role::LoraA(proj), &[rank, input]));
                second.push(spec("lora_B.weight", Role::LoraB(proj), &[out, rank]));
                if c.pissa().is_some() {
                    first.push(spec("lora_A.initial", Role::InitialA(proj), &[rank, input]));
                    second.push(spec("lora_B.initial", Role::InitialB(proj), &[out, rank]));
                }
                if c.use_dora {
                    second.push(spec("lora_magnitude_vector", Role::Magnitude(proj), &[out]));
                }
            }
        }
        AdapterKind::Prompt(c) => second.push(ParamSpec {
            name: "prompt_embeddings".into(),
            shape: vec![c.tokens, model.hidden_size],
            role: Role::Prompt,
            layer: None,
        }),
        AdapterKind::Bottleneck(c) => second.extend(c.params(model)),
        AdapterKind::Ia3(c) => {
            let rules = TargetRules {
                targets: &c.targets,
                excluded: excluded.as_ref(),
                layers: None,
                saved: &config.modules_to_save,
            };
            let bound = bound(&rules, model)?;
            if bound.embedding || bound.head {
                let message = "lora_target_modules: embed_tokens and lm_head support only LoRA; \
                               leave them out, or train them fully with lora_modules_to_save";
                return Err(Error::Config(message.into()));
            }
            for (layer, proj) in bound.projections {
                let (out, input) = model.proj_shape(proj);
                let module = model.module(proj);
                let feeds = c.feedforward.iter().any(|f| module.ends_with(f.as_str()));
                if feeds && model.group(proj.leader()).count() > 1 {
                    let message =
                        "shares its input with its neighbours; scale its output, not its input";
                    return Err(Error::Config(format!(
                        "feedforward_modules: {} {message}",
                        module
                    )));
                }
                second.push(ParamSpec {
                    name: format!("{PREFIX}{}.ia3_l", module_name(model, (layer, proj))),
                    shape: if feeds { vec![1, input] } else { vec![out, 1] },
                    role: Role::Ia3(proj),
                    layer: Some(layer),
                });
            }
        }
    }
    // The A matrices of projections that share an input form one matrix: first the trained ones,
    // then PiSSA's frozen ones.
    first.sort_by_key(|s: &ParamSpec| match s.role {
        Role::LoraA(p) => (s.layer, p.leader(), false),
        Role::InitialA(p) => (s.layer, p.leader(), true),
        _ => (s.layer, Proj::Q, false),
    });
    let base = expected_params(model);
    let mut copies: Vec<ParamSpec> = Vec::new();
    let tied = config.tied && model.tie_word_embeddings;
    if tied && first.iter().any(|s| matches!(s.role, Role::EmbedA | Role::HeadA)) {
        let message = "ensure_weight_tying = true: embed_tokens and lm_head have pairs of their \
                       own here; leave it out, or train them fully with lora_modules_to_save";
        return Err(Error::Config(message.into()));
    }
    let is_end = |name: &str| [EMBEDDING, "embed_tokens", HEAD].contains(&name);
    for name in &config.modules_to_save {
        // One copy serves both.
        let name = if tied && is_end(name) { EMBEDDING } else { name.as_str() };
        let is = |spec: &&ParamSpec| {
            let module = spec
                .name
                .strip_suffix(".weight")
                .or(spec.name.strip_suffix(".bias"))
                .unwrap_or(&spec.name);
            module.ends_with(name) // as PEFT matches: "norm" is every norm
        };
        let mut found: Vec<ParamSpec> = base.iter().filter(is).cloned().collect();
        if name == "lm_head" && model.tie_word_embeddings {
            // PEFT's copy of a tied head is a separate parameter.
            let shape = vec![model.vocab_size, model.hidden_size];
            found.push(ParamSpec {
                name: "lm_head.weight".into(),
                shape,
                role: Role::Head,
                layer: None,
            });
        }
        if found.is_empty() {
            let mut modules: Vec<&str> =
                base.iter().filter_map(|s| s.name.rsplit('.').nth(1)).collect();
            modules.sort();
            modules.dedup();
            let near =
                nearest(name, modules.iter().copied()).map(|n| format!("; did you mean {n}?"));
            let message = format!(
                "modules_to_save: the model has no module {name}{}",
                near.unwrap_or_default()
            );
            return Err(Error::Config(message));
        }
        let is_projection = |s: &&ParamSpec| Proj::ALL.iter().any(|p| p.role() == s.role);
        if found.iter().any(|s| is_projection(&s)) {
            return Err(Error::Config(format!(
                "modules_to_save: {name} is a projection; adapt it with LoRA, or train all weights"
            )));
        }
        // PEFT would train every module whose name ends with this name, projections too.
        let parent = |s: &ParamSpec| s.name.rsplitn(3, '.').nth(2).map(String::from);
        let holds = |s: &ParamSpec| parent(s).is_some_and(|module| module.ends_with(name));
        if base.iter().filter(is_projection).any(holds) {
            let inner: Vec<&str> = found.iter().filter_map(|s| s.name.rsplit('.').nth(1)).collect();
            return Err(Error::Config(format!(
                "modules_to_save: {name} is also a module that holds projections; name the inner one: {name}.{}",
                inner.first().unwrap_or(&"weight")
            )));
        }
        copies.extend(found);
    }
    if bias != LoraBias::None {
        let adapted = |s: &ParamSpec| {
            let module = s.name.trim_end_matches(".bias");
            second.iter().any(|b| b.name == format!("{PREFIX}{module}.lora_B.weight"))
        };
        // Fused biases are copied as a whole: q, k and v are contiguous.
        let wanted: Vec<(Option<usize>, Role)> = base
            .iter()
            .filter(|s| s.role.is_bias() && (bias == LoraBias::All || adapted(s)))
            .map(|s| (s.layer, fused_role(s.role)))
            .collect();
        let fused_with = |s: &&ParamSpec| wanted.contains(&(s.layer, fused_role(s.role)));
        copies.extend(base.iter().filter(|s| s.role.is_bias()).filter(fused_with).cloned());
    }
    let mut seen = HashSet::new();
    copies.retain(|spec| seen.insert(spec.name.clone()));
    for spec in &mut copies {
        // PEFT wraps an adapted layer, which moves its own bias one level down.
        let module = spec.name.trim_end_matches(".bias");
        let wrapped = second.iter().any(|b| b.name == format!("{PREFIX}{module}.lora_B.weight"));
        let name = if wrapped { format!("{module}.base_layer.bias") } else { spec.name.clone() };
        spec.name = format!("{PREFIX}{name}");
    }
    first.extend(second);
    first.extend(copies);
    Ok(first)
}
