//! Which options a resumed run may change. Layer 1.
//!
//! Invariant: an option that changes a number of the run is compared here, or its contents are (see
//! `train::inputs`); no option is compared by a path.

use super::Section;
use crate::error::{Error, Result};

/// Options that a resumed run may change: they change no number of the run that it continues.
const FREE_ON_RESUME: &[&str] = &[
    "logging_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "eval_strategy",
    "eval_steps",
    "per_device_eval_batch_size",
    "gradient_checkpointing",
    "compat",
    "resume_with_changes",
    "max_row_bytes",
    "report_to",
    "sample_prompts",
    "sample_max_new_tokens",
    "data_cache",
    "environment_timeout",
    "environment_restarts",
];

/// Options that name files: their contents are compared, not their paths.
const COMPARED_BY_CONTENTS: &[&str] = &[
    "chat_template_path",
    "ref_model",
    "teacher_model_name_or_path",
    "reward_model",
    "reward_funcs",
    "environment",
    "data",
];

/// Compares the resolved file of the run to resume with `sections`: one line for each option whose
/// change would make the resumed run differ from the uninterrupted one. Empty: the run may resume.
/// Error if `old` is not a run file.
pub fn changes(old: &str, sections: &[&dyn Section]) -> Result<Vec<String>> {
    let old: toml::Table =
        toml::from_str(old).map_err(|e| Error::Config(format!("config.toml: {e}")))?;
    let free = |name: &str| FREE_ON_RESUME.contains(&name) || COMPARED_BY_CONTENTS.contains(&name);
    let keys = sections.iter().flat_map(|s| s.keys()).filter(|k| !free(k.name));
    Ok(keys
        .filter_map(|k| {
            let before = old.get(k.name)?;
            (*before != k.value).then(|| format!("{}: was {before}, is now {}", k.name, k.value))
        })
        .collect())
}
