//! A linear layer of the decoder with its adapter. Layer 5.
//!
//! Invariant: only this file asks whether a weight is quantised or adapted.

use std::sync::Arc;

use crate::autograd::Cx;
use crate::error::Result;
use crate::model::adapter::AdapterSite;
use crate::ops::dropout::dropout;
use crate::ops::lora::{Base, lora_linear};
use crate::ops::matmul::linear;
use crate::ops::mlp::DenseLayer;
use crate::ops::quant::{QuantWeight, quant_linear};
use crate::ops::scale::scale_columns;
use crate::tensor::Tensor;

/// A linear layer (of projections that share their input) with its adapter site, if any.
#[derive(Clone)]
pub(super) struct Projection {
    pub weight: Weight,
    pub bias: Option<Tensor>,
    pub site: Option<AdapterSite>,
}

#[derive(Clone)]
pub(super) enum Weight {
    Dense(Tensor),
    /// Frozen.
    Quantised(Arc<QuantWeight>),
}

impl Weight {
    fn apply(&self, cx: &mut Cx, x: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
        match self {
            Weight::Dense(w) => linear(cx, x, w, bias),
            Weight::Quantised(w) => quant_linear(cx, x, w, bias),
        }
    }
}

impl Projection {
    /// Returns weight and bias if the layer is dense and has no adapter.
    pub fn dense(&self) -> Option<DenseLayer<'_>> {
        match (&self.weight, &self.site) {
            (Weight::Dense(weight), None) => Some(DenseLayer { weight, bias: self.bias.as_ref() }),
            _ => None,
        }
    }

    /// x [rows, in] -> [rows, out]. An adapter's dropout applies only with a tape, that is in
    /// training.
    pub fn apply(&self, cx: &mut Cx, x: &Tensor) -> Result<Tensor> {
        let Some(site) = &self.site else { return self.weight.apply(cx, x, self.bias.as_ref()) };
        let scaled = match &site.input_scale {
            Some(vector) => Some(scale_columns(cx, x, &[(0, vector.clone())], None, None)?),
            None => None,
        };
        let x = scaled.as_ref().unwrap_or(x);
        // DoRA scales the product without its bias; IA3 scales the whole output, as in PEFT.
        let bias_after = if site.norm.is_some() { self.bias.as_ref() } else { None };
        let bias = if site.norm.is_some() { None } else { self.bias.as_ref() };
        let y = match &site.lora {
            Some(lora) => {
                let drops = cx.tape.is_some() && lora.dropout > 0.0;
                let dropped = if drops { Some(dropout(cx, x, lora.dropout)?) } else { None };
                let base = match &self.weight {
                    Weight::Dense(w) => Base::Dense(w),
                    Weight::Quantised(w) => Base::Quantised(w),
                };
                lora_linear(cx, x, dropped.as_ref(), base, bias, &lora.pairs)?
            }
            None => self.weight.apply(cx, x, bias)?,
        };
        if site.output_scales.is_empty() {
            return Ok(y);
        }
        scale_columns(cx, &y, &site.output_scales, site.norm.as_ref(), bias_after)
    }
}
