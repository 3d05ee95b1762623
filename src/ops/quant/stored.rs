//! The names under which bitsandbytes stores a 4-bit weight. Layer 4.
//!
//! Invariant: the written tensors are those of `Params4bit`; what is read is checked before use.

use serde_json::{Value, json};

use super::weight::maps;
use super::{BLOCK4, BLOCK8, NF4, QuantWeight, Scales, Scheme, Segment, dynamic_map};
use crate::autograd::Cx;
use crate::device::DType;
use crate::error::{Error, Result};
use crate::tensor::Tensor;

/// A tensor of a file: name, dtype, shape, bytes.
pub type Stored = (String, DType, Vec<usize>, Vec<u8>);

const STATE: &str = "quant_state.bitsandbytes__nf4";

fn floats(values: &[f32]) -> Vec<u8> {
    bytemuck::cast_slice(values).to_vec()
}

impl QuantWeight {
    /// Segment `i` as bitsandbytes stores it: `name` (the codes), `name.absmax`, `name.quant_map`
    /// and so on. `dtype` is the one that readers dequantise to. Error for int8, which that format
    /// does not support.
    pub fn stored(&self, i: usize, name: &str, dtype: DType) -> Result<Vec<Stored>> {
        let s = self
            .segments
            .get(i)
            .ok_or_else(|| Error::op("quantise", format!("no segment {i} of {name}")))?;
        if self.scheme == Scheme::Int8 {
            let message = format!("{name} is int8: only nf4 has bitsandbytes' 4-bit storage");
            return Err(Error::op("quantise", message));
        }
        let mut out =
            vec![(name.to_string(), DType::U8, vec![s.codes.numel(), 1], s.codes.to_vec::<u8>()?)];
        let mut add = |key: &str, dtype, shape: usize, bytes| {
            out.push((format!("{name}.{key}"), dtype, vec![shape], bytes));
        };
        let mut state = json!({
            "quant_type": "nf4", "blocksize": BLOCK4, "dtype": dtype.name(), "shape": [s.rows, self.shape[1]],
        });
        add("quant_map", DType::F32, 16, floats(&NF4));
        match &s.scales {
            Scales::Float(absmax) => {
                add("absmax", DType::F32, absmax.numel(), floats(&absmax.to_vec::<f32>()?))
            }
            Scales::Nested { codes, absmax, offset } => {
                add("absmax", DType::U8, codes.numel(), codes.to_vec::<u8>()?);
                add("nested_absmax", DType::F32, absmax.numel(), floats(&absmax.to_vec::<f32>()?));
                add("nested_quant_map", DType::F32, 256, floats(&dynamic_map(true)));
                state["nested_blocksize"] = json!(BLOCK8);
                state["nested_dtype"] = json!("float32");
                state["nested_offset"] = json!(f64::from(offset.to_f32()?[0]));
            }
        }
        let text = state.to_string().into_bytes();
        add(STATE, DType::U8, text.len(), text);
        Ok(out)
    }

    /// A weight from segments that bitsandbytes stored: (name, codes) each; `find` returns the
    /// tensors beside the codes (`name.absmax`, ...). Error for formats, block sizes and maps other
    /// than NF4's with 64 and 256.
    pub fn from_stored(
        cx: &Cx,
        names: &[&str],
        find: impl Fn(&str) -> Result<Vec<u8>>,
    ) -> Result<QuantWeight> {
        let (nf4, dynamic) = maps(cx)?;
        let mut weight = QuantWeight {
            scheme: Scheme::Nf4 { double: true },
            shape: [0, 0],
            segments: Vec::new(),
            nf4,
            dynamic,
        };
        for (i, name) in names.iter().enumerate() {
            let bad = |what: String| {
                Error::op("quantise", format!("{name}: {what}; quantise the float weights instead"))
            };
            let state: Value = serde_json::from_slice(&find(&format!("{name}.{STATE}"))?)
                .map_err(|e| bad(format!("{STATE} is not JSON: {e}")))?;
            let number = |v: &Value, key: &str| {
                v.as_u64().ok_or_else(|| bad(format!("no {key}"))).map(|v| v as usize)
            };
            let (rows, cols) =
                (number(&state["shape"][0], "shape")?, number(&state["shape"][1], "shape")?);
            let (n, block) = (rows * cols, number(&state["blocksize"], "blocksize")?);
            let double = state.get("nested_offset").is_some();
            let scheme = Scheme::Nf4 { double };
            if block != BLOCK4 || (double && state["nested_blocksize"] != json!(BLOCK8)) {
                return Err(bad(format!(
                    "blocks of {block} and {}, not 64 and 256",
                    state["nested_blocksize"]
                )));
            }
            if i > 0 && (cols != weight.shape[1] || scheme != weight.scheme) {
                return Err(bad(
                    "its columns or its double quantisation are not those of its neighbours".into(),
                ));
            }
            if find(&format!("{name}.quant_map"))? != floats(&NF4) {
                return Err(bad("its quant_map is not NF4's".into()));
            }
            let tensor = |key: &str, dtype: DType, len: usize| -> Result<Tensor> {
                let bytes =
                    find(&if key.is_empty() { name.to_string() } else { format!("{name}.{key}") })?;
                if bytes.len() != len * dtype.size() {
                    return Err(bad(format!(
                        "{key} has {} bytes, not {}",
                        bytes.len(),
                        len * dtype.size()
                    )));
                }
                let t = Tensor::new(&cx.pool, "nf4", dtype, &[len])?;
                t.upload(&bytes)?;
                Ok(t)
            };
            let blocks = n.div_ceil(BLOCK4);
            let scales = if double {
                // Maps differ in the last bit between versions of bitsandbytes; the codes refer to
                // the file's own.
                let map = tensor("nested_quant_map", DType::F32, 256)?;
                if i > 0 && map.to_vec::<f32>()? != weight.dynamic.to_vec::<f32>()? {
                    return Err(bad("its nested_quant_map is not that of its neighbours".into()));
                }
                weight.dynamic = map;
                let offset =
                    state["nested_offset"].as_f64().ok_or_else(|| bad("no nested_offset".into()))?
                        as f32;
                Scales::Nested {
                    codes: tensor("absmax", DType::U8, blocks)?,
                    absmax: tensor("nested_absmax", DType::F32, blocks.div_ceil(BLOCK8))?,
                    offset: Tensor::from_host(&cx.pool, "nf4 offset", DType::F32, &[1], &[offset])?,
                }
            } else {
                Scales::Float(tensor("absmax", DType::F32, blocks)?)
            };
            weight.segments.push(Segment {
                rows,
                codes: tensor("", DType::U8, n.div_ceil(2))?,
                scales,
            });
            (weight.scheme, weight.shape) = (scheme, [weight.shape[0] + rows, cols]);
        }
        if weight.segments.is_empty() {
            return Err(Error::op("quantise", "a weight of no segments"));
        }
        Ok(weight)
    }
}
