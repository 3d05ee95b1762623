//! The served models: a base, and adapters on it, each with a name. Layer 9.
//!
//! Invariant: the weights of the base are in memory once, whatever the number of names.

use std::path::{Path, PathBuf};

use super::names::Served;
use crate::autograd::Cx;
use crate::config::ServeConfig;
use crate::data::render::ModelText;
use crate::error::{Error, Result};
use crate::model::adapter::Adapter;
use crate::model::decoder::Decoder;
use crate::model::layout::Task;
use crate::model::open::open_stored;
use crate::ops::quant::Scheme;
use crate::rollout::stop::stop_ids;

/// The longest sequence if neither the options nor the model set a lower limit.
const DEFAULT_LONGEST: usize = 8192;

/// The value of `--adapter NAME=DIR`.
#[derive(Clone, Debug)]
pub struct AdapterSpec {
    pub name: String,
    pub dir: PathBuf,
}

impl AdapterSpec {
    /// Parses `NAME=DIR`. For `DIR` alone, the name is its last part.
    pub fn parse(text: &str) -> AdapterSpec {
        let whole = Path::new(text);
        match text.split_once('=') {
            Some((name, dir)) if !name.is_empty() && !whole.exists() => {
                AdapterSpec { name: name.into(), dir: dir.into() }
            }
            _ => AdapterSpec { name: last_part(whole), dir: whole.into() },
        }
    }
}

/// The served models in the order of their names, the base first.
pub struct ServedModels {
    pub(super) names: Vec<Served>,
    pub(super) decoders: Vec<Decoder>,
}

fn last_part(path: &Path) -> String {
    let own = path.canonicalize().unwrap_or(path.into());
    own.file_name().map_or_else(|| path.display().to_string(), |n| n.to_string_lossy().into())
}

impl ServedModels {
    /// Opens the model in folder `dir`, which the command line calls `given`, and adapters on it.
    pub fn open(
        cx: &Cx,
        (given, dir): (&str, &Path),
        adapters: &[AdapterSpec],
        storage: Option<Scheme>,
        config: &ServeConfig,
    ) -> Result<ServedModels> {
        let mut base = open_stored(cx, dir, None, storage)?;
        if base.config.task != Task::CausalLm {
            let message = "is a classifier, which generates no text; serve a language model, or \
                           score rows with `temper score`";
            return Err(Error::model(dir, message));
        }
        let longest = config
            .max_model_len
            .unwrap_or(base.config.max_position_embeddings.min(DEFAULT_LONGEST));
        let served = |name: String, adapter: Option<&Path>, decoder: &Decoder| -> Result<Served> {
            let text = ModelText::open(dir, adapter, &config.template)?;
            let stop = stop_ids(&text.tokenizer, &decoder.config, &[])?;
            let vocab = decoder.config.vocab_size;
            Ok(Served { name, alias: None, text, stop, vocab, longest })
        };
        let loaded = adapters.iter().map(|spec| {
            let adapter = Adapter::load(cx, &spec.dir, &base.config, &base.params)?;
            Ok(base.clone().with_adapter(Some(adapter))?.vocab().virtuals)
        });
        // The base owns the rope table, which grows once for all names.
        let virtuals = loaded.collect::<Result<Vec<_>>>()?.into_iter().max().unwrap_or(0);
        base.ensure_positions(cx, longest + virtuals)?;
        let name = config.served_name.clone().unwrap_or_else(|| last_part(dir));
        let mut first = served(name, None, &base)?;
        first.alias = Some(given.to_string());
        let (mut names, mut decoders) = (vec![first], vec![base.clone()]);
        for spec in adapters {
            if names.iter().any(|other| other.is(&spec.name)) {
                return Err(Error::Config(format!(
                    "two models are named {:?}; name the adapter with --adapter NAME=DIR, the model \
                     with served_name=NAME",
                    spec.name
                )));
            }
            let adapter = Adapter::load(cx, &spec.dir, &base.config, &base.params)?;
            let decoder = base.clone().with_adapter(Some(adapter))?;
            names.push(served(spec.name.clone(), Some(&spec.dir), &decoder)?);
            decoders.push(decoder);
        }
        Ok(ServedModels { names, decoders })
    }

    /// The names of the models.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.iter().map(|served| served.name.as_str())
    }

    /// Bytes of keys and values allocated for each name.
    pub fn cache_bytes(&self, config: &ServeConfig, element: usize) -> usize {
        let model = &self.decoders[0].config;
        let widths = (0..model.num_layers).map(|layer| model.cached_width(layer));
        let row = widths.sum::<usize>() * element;
        config.cache_tokens.max(self.names[0].longest) * row
    }
}
