//! Opens a trained model: a folder, with an adapter if given. Layer 5.
//!
//! Invariant: the commands and the library open a model here, so an adapter gets the same base, and
//! the same errors, everywhere.

use std::path::Path;

use crate::autograd::Cx;
use crate::error::Result;
use crate::model::adapter::Adapter;
use crate::model::adapter::config::AdapterConfig;
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::ops::quant::Scheme;

/// Like [`open_stored`], in the storage dtype.
pub fn open_model(cx: &Cx, dir: &Path, adapter: Option<&Path>) -> Result<Decoder> {
    open_stored(cx, dir, adapter, None)
}

/// Reads a Hugging Face folder and applies the adapter of a PEFT or adapter-hub folder. The adapter
/// of a classifier provides the score that its base, a language model, lacks. Errors: those of
/// either folder, an adapter for another task or base. With a scheme, linear layers are quantised,
/// as for QLoRA training.
pub fn open_stored(
    cx: &Cx,
    dir: &Path,
    adapter: Option<&Path>,
    storage: Option<Scheme>,
) -> Result<Decoder> {
    let mut builder = Decoder::folder(dir)?.storage(storage);
    let Some(adapter) = adapter else { return builder.build(cx) };
    let task = AdapterConfig::load(adapter)?.task;
    for wanted in
        [Task::SequenceClassification { labels: 1 }, Task::TokenClassification { labels: 2 }]
    {
        if builder.config().task == Task::CausalLm && task == wanted.peft_name() {
            builder = builder.task(wanted);
        }
    }
    let model = builder.build(cx)?;
    let adapter = Adapter::load(cx, adapter, &model.config, &model.params)?;
    model.with_adapter(Some(adapter))
}
