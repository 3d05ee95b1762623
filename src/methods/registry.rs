//! Every method, one line each. Layer 7.
//!
//! Invariant: the training commands, their help, the tables of options in the docs and the tests of
//! options are loops over this list.

use super::{MethodEntry, offline, online};
use crate::error::{Error, Result, nearest};

pub const REGISTRY: &[&MethodEntry] = &[
    &offline::sft::METHOD,
    &offline::sft::PRETRAIN,
    &offline::dpo::METHOD,
    &offline::reward::METHOD,
    &offline::prm::METHOD,
    &offline::kto::METHOD,
    &offline::orpo::METHOD,
    &offline::cpo::METHOD,
    &offline::distill::METHOD,
    &online::grpo::METHOD,
    &online::rloo::METHOD,
    &online::reinforce::METHOD,
    &online::ppo::METHOD,
    &online::online_dpo::METHOD,
    &online::gkd::METHOD,
    &online::on_policy_distill::METHOD,
];

/// The method of a command. Error if there is none.
pub fn find(name: &str) -> Result<&'static MethodEntry> {
    let names = || REGISTRY.iter().map(|e| e.name);
    REGISTRY.iter().copied().find(|e| e.name == name).ok_or_else(|| {
        let hint = nearest(name, names()).map(|n| format!("; did you mean {n}?"));
        let hint = hint.unwrap_or_else(|| {
            format!("; known methods: {}", names().collect::<Vec<_>>().join(", "))
        });
        Error::Config(format!("unknown method {name}{hint}"))
    })
}
