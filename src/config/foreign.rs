//! Options of TRL and transformers that this engine does not have, so that users can bring their
//! configs. Layer 1.
//!
//! Invariant: such an option is never dropped silently. It is translated into one of ours, or
//! produces a note that it has no effect; an option that would change the numbers if it were obeyed
//! is an error unless its value is neutral.

use super::value::Given;

pub enum Fate {
    /// Stands for `key = value` of ours; the third field explains it.
    Means(&'static str, String, &'static str),
    /// Accepted with this note.
    NoEffect(&'static str),
    /// Refused with this message.
    Refused(&'static str),
}

/// Whether TRL or transformers has the option, as far as we know.
pub fn is_foreign(key: &str) -> bool {
    fate(key, &Given::Text(String::new()), false).is_some()
        || ["torch_dtype", "evaluation_strategy"].contains(&key)
}

/// What happens to a foreign option, in a method that generates (`online`) or another; None if
/// neither TRL nor transformers has it, as far as we know.
pub fn fate(key: &str, given: &Given, online: bool) -> Option<Fate> {
    if let Some(fate) = meaning(key, given, online) {
        return Some(fate);
    }
    if let Some((_, why)) = NO_EFFECT.iter().find(|(keys, _)| keys.contains(&key)) {
        return Some(Fate::NoEffect(why));
    }
    let (_, neutral, message) = MATTERS.iter().find(|(k, ..)| *k == key)?;
    let neutral = given.is_none()
        || neutral.contains(&given.shown().trim_matches('"').to_lowercase().as_str());
    Some(if neutral { Fate::NoEffect("it is off here too") } else { Fate::Refused(message) })
}

fn meaning(key: &str, given: &Given, online: bool) -> Option<Fate> {
    let shown = given.shown().to_lowercase();
    let means = |key, value: &str, why| Some(Fate::Means(key, value.to_string(), why));
    match (key, shown.trim_matches('"')) {
        ("bf16", "true") => means("dtype", "bfloat16", "bf16 = true"),
        ("bf16", "false") => means("dtype", "float32", "bf16 = false"),
        ("torch_dtype", _) if !given.is_none() => {
            means("dtype", shown.trim_matches('"'), "torch_dtype is dtype here")
        }
        ("use_cpu" | "no_cuda", "true") => means("device", "cpu", "use_cpu = true"),
        ("warmup_ratio", _) if !given.is_none() => means(
            "warmup_steps",
            shown.trim_matches('"'),
            "transformers 5 has warmup_ratio in warmup_steps",
        ),
        ("do_sample", "false") => means("temperature", "0", "do_sample = false"),
        ("shuffle_dataset", "true") => {
            means("train_sampling_strategy", "random", "shuffle_dataset = true")
        }
        // Online, TRL takes the order from this; elsewhere it shuffles before the sampler does.
        ("shuffle_dataset", "false") if online => {
            means("train_sampling_strategy", "sequential", "shuffle_dataset = false")
        }
        ("reward_model_name_or_path", _) if !given.is_none() => {
            let value = given.shown().trim_matches('"').to_string();
            Some(Fate::Means(
                "reward_model",
                value,
                "reward_model_name_or_path is reward_model here",
            ))
        }
        ("evaluation_strategy", _) => means(
            "eval_strategy",
            shown.trim_matches('"'),
            "evaluation_strategy is eval_strategy now",
        ),
        _ => None,
    }
}

/// The treatment of an option in words, for the docs; None if neither TRL nor transformers has it,
/// as far as we know.
pub fn described(key: &str) -> Option<String> {
    if let Some((_, meaning)) = MEANINGS.iter().find(|(keys, _)| keys.contains(&key)) {
        return Some(format!("means {meaning}"));
    }
    if let Some((_, why)) = NO_EFFECT.iter().find(|(keys, _)| keys.contains(&key)) {
        return Some(format!("no effect: {why}"));
    }
    let (_, neutral, message) = MATTERS.iter().find(|(k, ..)| *k == key)?;
    let off: Vec<String> =
        neutral.iter().filter(|n| !n.is_empty()).map(|n| format!("`{n}`")).collect();
    let or = if off.is_empty() { "" } else { " or " };
    Some(format!("refused unless {}{or}none: {message}", off.join(", ")))
}

/// The translations of [`meaning`], in words.
const MEANINGS: &[(&[&str], &str)] = &[
    (&["bf16"], "`dtype`: true bfloat16, false float32"),
    (&["torch_dtype"], "`dtype`"),
    (&["use_cpu", "no_cuda"], "`device = \"cpu\"`, if true"),
    (&["warmup_ratio"], "`warmup_steps`, a share of the steps"),
    (&["do_sample"], "`temperature = 0`, if false"),
    (
        &["shuffle_dataset"],
        "`train_sampling_strategy`: true random, false sequential (in online methods)",
    ),
    (&["evaluation_strategy"], "`eval_strategy`"),
    (&["reward_model_name_or_path"], "`reward_model`"),
];

/// Options that change no number here, and why.
const NO_EFFECT: &[(&[&str], &str)] = &[
    (&["fp16"], "float16 is not supported; dtype sets the number type"),
    (&["bf16", "torch_dtype", "bf16_full_eval", "fp16_full_eval"], "dtype sets the number type"),
    (&["tf32"], "float32 products are computed in float32"),
    (&["use_cpu", "no_cuda"], "device sets where the run is computed"),
    (&["warmup_ratio", "do_sample"], "it is off"),
    (&["model_name_or_path"], "--model sets the model"),
    (&["dataset_name", "datasets"], "--data FILE sets the training rows"),
    (&["test_split_size"], "--eval-data or eval_rows sets the evaluation rows"),
    (&["streaming"], "rows are read before the run"),
    (&["env"], "temper sets no environment variables; set them in the shell"),
    (&["reward_model_name_or_path"], "no reward model is given"),
    (&["output_dir", "overwrite_output_dir"], "--output DIR sets where the run is written"),
    (
        &["run_name", "logging_dir", "project", "trackio_space_id"],
        "metrics.jsonl holds every logged step",
    ),
    (
        &["log_level", "log_level_replica", "log_on_each_node", "disable_tqdm"],
        "the log has one format",
    ),
    (
        &["logging_first_step", "include_num_input_tokens_seen", "skip_memory_metrics"],
        "the log has one format",
    ),
    (&["logging_nan_inf_filter"], "NaN is logged as nan and never replaced"),
    (
        &[
            "dataloader_num_workers",
            "dataloader_pin_memory",
            "dataloader_persistent_workers",
            "dataloader_prefetch_factor",
            "dataloader_in_order",
            "dataloader_multiprocessing_context",
            "dataset_num_proc",
        ],
        "rows are prepared once, before the run",
    ),
    (&["remove_unused_columns", "label_names"], "unused fields are always left out"),
    (
        &[
            "use_liger_kernel",
            "liger_kernel_config",
            "torch_compile",
            "torch_compile_backend",
            "torch_compile_mode",
        ],
        "kernels are always fused",
    ),
    (&["attn_implementation"], "the option attention chooses the kernels"),
    (
        &["gradient_checkpointing_kwargs", "activation_offloading", "torch_empty_cache_steps"],
        "the memory plan decides",
    ),
    (&["padding_free", "pad_to_multiple_of", "pad_token"], "there is no padding"),
    (
        &["average_tokens_across_devices", "accelerator_config", "ddp_timeout", "ddp_backend"],
        "a run has one GPU",
    ),
    (&["save_on_each_node", "local_rank", "ddp_find_unused_parameters"], "a run has one GPU"),
    (&["save_safetensors", "enable_jit_checkpoint"], "temper always does this"),
    (&["full_determinism"], "every run is deterministic"),
    (
        &[
            "ddp_broadcast_buffers",
            "ddp_bucket_cap_mb",
            "ddp_static_graph",
            "parallelism_config",
            "eval_use_gather_object",
        ],
        "a run has one GPU",
    ),
    (
        &["batch_eval_metrics", "include_for_metrics", "eval_do_concat_batches"],
        "the loss is the evaluation's metric",
    ),
    (
        &["hub_always_push", "hub_private_repo", "hub_revision", "hub_strategy", "hub_token"],
        "temper does not upload",
    ),
    (&["trackio_bucket_id", "trackio_static_space_id"], "metrics.jsonl holds every logged step"),
    (
        &["length_column_name", "debug", "restore_callback_states_from_checkpoint"],
        "temper does not use it",
    ),
    (&["trust_remote_code"], "code from a model folder is never run"),
    (
        &["use_cache", "do_train", "do_eval", "do_predict", "prediction_loss_only"],
        "the command sets the task",
    ),
    (
        &[
            "vllm_mode",
            "vllm_model_impl",
            "vllm_enable_sleep_mode",
            "vllm_server_base_url",
            "vllm_server_host",
            "vllm_server_port",
            "vllm_server_timeout",
            "vllm_group_port",
            "vllm_gpu_memory_utilization",
            "vllm_max_model_length",
            "vllm_tensor_parallel_size",
            "use_vllm",
            "use_transformers_continuous_batching",
            "transformers_continuous_batching_config",
            "use_transformers_paged",
            "cache_implementation",
        ],
        "the engine's own sampler generates",
    ),
    (
        &[
            "vllm_importance_sampling_correction",
            "vllm_importance_sampling_mode",
            "vllm_importance_sampling_clip_max",
            "vllm_importance_sampling_clip_min",
            "vllm_importance_sampling_cap",
        ],
        "the sampler's log-probs are the trainer's: there is nothing to correct",
    ),
    (&["ds3_gather_for_generation", "ignore_bias_buffers"], "a run has one GPU"),
    (&["cast_lm_head_to_fp32"], "logits are always float32"),
    (
        &[
            "log_multimodal",
            "num_completions_to_print",
            "log_unique_prompts",
            "log_completions_hub_repo",
        ],
        "completions.jsonl holds every completion",
    ),
    (&["bnb_4bit_quant_storage"], "it changes how 4-bit codes are stored, not their values"),
    (&["lora_task_type"], "the command sets what is trained"),
    (&["dataset_train_split", "dataset_test_split"], "--data and --eval-data name files"),
    (
        &["entropy_coef_min", "entropy_coef_max", "entropy_coef_delta", "entropy_target"],
        "only use_adaptive_entropy uses it, and that is refused",
    ),
    (&["eval_accumulation_steps"], "temper does not use it"),
];

/// Options that would change the run: (key, neutral values beside none, what to do).
const MATTERS: &[(&str, &[&str], &str)] = &[
    ("label_smoothing_factor", &["0", "0.0"], "label smoothing is not supported; set it to 0"),
    ("neftune_noise_alpha", &[], "NEFTune is not supported; leave it out"),
    ("optim_args", &[], "the optimizer takes adam_beta1, adam_beta2, adam_epsilon; leave it out"),
    ("optim_target_modules", &[], "GaLore and APOLLO are not supported; leave it out"),
    ("data_seed", &["42"], "seed sets the order of rows; leave it out"),
    ("dataloader_drop_last", &["false"], "the last, smaller batch is trained on; leave it out"),
    (
        "auto_find_batch_size",
        &["false"],
        "temper fits a batch into memory without changing it; leave it out",
    ),
    ("shuffle_dataset", &["false"], "give true or false"),
    ("eval_packing", &[], "evaluation rows are treated as training rows; leave it out"),
    ("logging_strategy", &["steps"], "give logging_steps"),
    ("eval_delay", &["0", "0.0"], "evaluation begins at once; leave it out"),
    ("eval_on_start", &["false"], "eval_strategy decides when to evaluate; leave it out"),
    (
        "save_only_model",
        &["false"],
        "a checkpoint always has what a resumed run needs; leave it out",
    ),
    ("ignore_data_skip", &["false"], "a resumed run continues where it stopped; leave it out"),
    ("resume_from_checkpoint", &["false"], "give --resume on the command line"),
    ("push_to_hub", &["false"], "temper does not upload: run `hf upload` when the run is done"),
    ("hub_model_id", &[], "temper does not upload: run `hf upload` when the run is done"),
    ("deepspeed", &[], "a run has one GPU; leave it out"),
    ("fsdp", &["", "[]"], "a run has one GPU; leave it out"),
    ("fsdp_config", &["{}"], "a run has one GPU; leave it out"),
    ("load_in_8bit", &["false"], "weights are trained as they are; leave it out"),
    ("model_init_kwargs", &["{}"], "set the options dtype and attention instead"),
    ("dataset_kwargs", &["{}"], "leave it out"),
    (
        "router_aux_loss_coef",
        &["0", "0.0", "0.001"],
        "mixtures of experts are not supported; leave it out",
    ),
    ("repetition_penalty", &["1", "1.0"], "it would change the distribution; leave it out"),
    ("num_beams", &["1"], "completions are sampled, or greedy with temperature = 0"),
    ("num_generations_eval", &[], "evaluation uses num_generations; leave it out"),
    (
        "generation_batch_size",
        &[],
        "give steps_per_generation: generation_batch_size / per_device_train_batch_size",
    ),
    (
        "generation_kwargs",
        &["{}"],
        "set the options temperature, top_p, top_k, min_p, repetition_penalty instead",
    ),
    ("chat_template_kwargs", &["{}"], "put them into the rows, in the column chat_template_kwargs"),
    ("vllm_structured_outputs_regex", &[], "guided decoding is not supported; leave it out"),
    ("use_adaptive_entropy", &["false"], "give a fixed entropy_coef"),
    ("model_revision", &["main"], "--model takes a folder; download the revision into a folder"),
    ("lora_target_parameters", &[], "list the modules in lora_target_modules"),
    ("dataset_config", &[], "give --data FILE on the command line"),
    ("dataset_streaming", &["false"], "rows are read before the run; leave it out"),
    ("train_file", &[], "give --data FILE on the command line"),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_key_means_is_said_in_words() {
        for (keys, _) in MEANINGS {
            for key in *keys {
                let fates =
                    ["true", "false", "x"].map(|value| fate(key, &Given::Text(value.into()), true));
                assert!(fates.iter().flatten().any(|f| matches!(f, Fate::Means(..))), "{key}");
            }
        }
    }

    #[test]
    fn a_foreign_key_stands_in_one_list() {
        let mut all: Vec<&str> =
            NO_EFFECT.iter().flat_map(|(keys, _)| keys.iter().copied()).collect();
        all.extend(MATTERS.iter().map(|(key, ..)| *key));
        let count = all.len();
        all.sort_unstable();
        all.dedup();
        assert_eq!(all.len(), count);
    }
}
