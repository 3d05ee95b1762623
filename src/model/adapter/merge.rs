//! Merges an adapter into the weights of its base. Layer 5.
//!
//! Invariant: merging is done in f32, and the merged model equals the adapted one up to the
//! rounding of the stored weights.

use super::config::AdapterKind;
use super::{Adapter, base_name, merged};
use crate::autograd::Cx;
use crate::device::Layout;
use crate::error::{Error, Result};
use crate::model::decoder::Decoder;
use crate::model::layout::{ModelConfig, Task};
use crate::model::specs::{ParamSpec, Proj, Role};
use crate::ops::matmul::product;
use crate::tensor::Tensor;

/// Returns an error for a kind of adapter that cannot be merged into the base's weights.
pub fn mergeable(adapter: &Adapter) -> Result<()> {
    let why = match adapter.config.kind {
        AdapterKind::Lora(_) | AdapterKind::Ia3(_) => return Ok(()),
        AdapterKind::Prompt(_) => {
            "a tuned prompt is rows before the sequence, and part of no weight"
        }
        AdapterKind::Bottleneck(_) => {
            "a bottleneck adapter is a layer with a non-linearity, and part of no weight"
        }
    };
    Err(Error::Config(format!("merge: {why}; use the adapter's folder as it is, beside its base")))
}

/// Returns the config of the merged model: the head is untied if the adapter makes it differ from
/// the embedding.
pub fn merged_config(model: &Decoder) -> ModelConfig {
    let mut config = model.config.clone();
    let brings = |role| {
        model.adapter.as_ref().is_some_and(|a| matches!(a.params.fused(None, role), Ok(Some(_))))
    };
    let parts = [Role::Head, Role::Embed, Role::HeadA, Role::EmbedA];
    let tied = model.adapter.as_ref().is_some_and(Adapter::ties_head);
    if config.task == Task::CausalLm && !tied && parts.into_iter().any(brings) {
        config.tie_word_embeddings = false;
    }
    config
}

/// Returns the merged values of one parameter of the merged model, in f32. The context must be f32.
/// Errors: a model without an adapter.
pub fn merged_values(cx: &Cx, model: &Decoder, spec: &ParamSpec) -> Result<Vec<f32>> {
    let Some(adapter) = &model.adapter else {
        return Err(Error::op("merge", "the model has no adapter"));
    };
    if let Some(i) = adapter.params.specs.iter().position(|s| base_name(&s.name) == spec.name) {
        return adapter.params.weight_view(i)?.to_f32();
    }
    let stored = match spec.role {
        // A head that is no longer tied, because only the embedding was trained, has the old
        // embedding's values.
        Role::Head if model.config.tie_word_embeddings => "model.embed_tokens.weight",
        _ => spec.name.as_str(),
    };
    let found = model.params.by_name(stored);
    let i = found.ok_or_else(|| Error::op("merge", format!("{} has no place", spec.name)))?;
    let w = model.params.weight_view(i)?;
    match (spec.role, &adapter.embedding, &adapter.head) {
        (Role::Embed, Some(pair), _) => {
            return merged_end(cx, &w, (Layout::NT, &pair.a, &pair.b), pair.scale);
        }
        (Role::Head, _, Some(pair)) => {
            return merged_end(cx, &w, (Layout::NN, &pair.b, &pair.a), pair.scale);
        }
        _ => {}
    }
    let mut values = w.to_f32()?;
    let (Some(layer), Some((proj, bias))) = (spec.layer, projection(&model.config, spec.role))
    else {
        return Ok(values);
    };
    let Some(site) = adapter.site(layer, proj.leader()) else { return Ok(values) };
    let (rows, cols) = model.config.proj_shape(proj);
    let before = model.config.group(proj.leader()).take_while(|p| *p != proj);
    let from: usize = before.map(|p| model.config.proj_shape(p).0).sum();
    if let (false, Some(lora)) = (bias, &site.lora) {
        let mut w = model.params.weight_view(i)?;
        // PiSSA has two segments for the same columns.
        for (segment, b) in
            lora.pairs.segments.iter().zip(&lora.pairs.b).filter(|(s, _)| s.from == from)
        {
            w = merged(cx, &w, lora, segment, b)?;
        }
        values = w.to_f32()?;
    }
    if let (false, Some(vector)) = (bias, &site.input_scale) {
        let scale = vector.to_f32()?;
        values
            .chunks_exact_mut(cols)
            .for_each(|row| row.iter_mut().zip(&scale).for_each(|(v, s)| *v *= s));
    }
    for (start, vector) in site.output_scales.iter().filter(|(start, _)| *start == from) {
        // DoRA's magnitude does not scale the bias; IA3's vector does.
        if bias && site.norm.is_some() {
            continue;
        }
        let mut scale = vector.to_f32()?;
        if let Some(norm) = &site.norm {
            let norm = norm.rows(*start, start + rows)?.to_f32()?;
            scale.iter_mut().zip(norm).for_each(|(s, n)| *s /= n);
        }
        let width = if bias { 1 } else { cols };
        values
            .chunks_exact_mut(width)
            .zip(scale)
            .for_each(|(row, s)| row.iter_mut().for_each(|v| *v *= s));
    }
    Ok(values)
}

/// Returns w + scale a b; the layout says which factors are transposed.
fn merged_end(
    cx: &Cx,
    w: &Tensor,
    (layout, a, b): (Layout, &Tensor, &Tensor),
    scale: f32,
) -> Result<Vec<f32>> {
    let delta = cx.float("merged weight", w.shape())?;
    product(cx, layout, &delta, a, b, None, false)?;
    let mut values = w.to_f32()?;
    values.iter_mut().zip(delta.to_f32()?).for_each(|(v, d)| *v += scale * d);
    Ok(values)
}

/// Returns the projection of a weight's or bias's role, and whether it is the bias.
fn projection(config: &ModelConfig, role: Role) -> Option<(Proj, bool)> {
    let bias = match role {
        Role::QBias => Some(Proj::Q),
        Role::KBias => Some(Proj::K),
        Role::VBias => Some(Proj::V),
        Role::OBias => Some(Proj::O),
        Role::GateBias => Some(Proj::Gate),
        Role::UpBias => Some(Proj::Up),
        Role::DownBias => Some(Proj::Down),
        Role::ConvInBias => Some(Proj::ConvIn),
        Role::ConvOutBias => Some(Proj::ConvOut),
        _ => None,
    };
    match bias {
        Some(proj) => Some((proj, true)),
        None => config.all_projections().into_iter().find(|p| p.role() == role).map(|p| (p, false)),
    }
}
