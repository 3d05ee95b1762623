//! The sections of the preference methods: TRL's options at TRL's defaults, and the problems that
//! their rules find.

use serde_json::Value;
use temper::config::{Section, load, to_toml};
use temper::error::Result;
use temper::methods::offline::cpo::CpoConfig;
use temper::methods::offline::distill::DistillConfig;
use temper::methods::offline::dpo::DpoConfig;
use temper::methods::offline::kto::KtoConfig;
use temper::methods::offline::orpo::OrpoConfig;
use temper::methods::offline::reward::RewardConfig;
use temper::ops::preference::DpoLoss;

use crate::support::{fixture, json, words};

#[test]
fn every_key_is_trls_at_its_default_or_says_that_it_is_ours() {
    let trl = json(fixture("preferences/defaults.json"));
    let (dpo, kto, orpo) = (DpoConfig::default(), KtoConfig::default(), OrpoConfig::default());
    let (cpo, reward, distill) =
        (CpoConfig::default(), RewardConfig::default(), DistillConfig::default());
    let sections: [(&str, &dyn Section); 6] = [
        ("dpo", &dpo),
        ("kto", &kto),
        ("orpo", &orpo),
        ("cpo", &cpo),
        ("reward", &reward),
        ("distill", &distill),
    ];
    for (name, section) in sections {
        let mut shared = 0;
        for key in section.keys() {
            assert!(!key.doc.is_empty(), "{name}: {}", key.name);
            let Some(theirs) = trl[name].get(key.name) else {
                assert!(
                    key.doc.starts_with("Ours"),
                    "{name}: TRL has no {}, and its doc does not say so",
                    key.name
                );
                continue;
            };
            assert!(!key.doc.starts_with("Ours"), "{name}: TRL has {} too", key.name);
            let ours = match serde_json::to_value(&key.value).unwrap() {
                Value::String(none) if none == "none" => Value::Null,
                other => other,
            };
            assert_eq!(&ours, theirs, "{name}: {}", key.name);
            shared += 1;
        }
        assert!(shared >= 2, "{name}: {shared} keys are TRL's");
        let text = to_toml("head", &[section]);
        assert!(text.contains("max_length = 1024"), "{text}");
    }
}

fn said<S: Section + Default>(keys: &str) -> String {
    let mut section = S::default();
    let loaded: Result<Vec<String>> = load(&mut [&mut section], None, &words(keys));
    loaded.unwrap_err().to_string()
}

#[test]
fn contradictions_and_values_out_of_range_are_found() {
    for (keys, part) in [
        ("beta=0", "beta = 0: must be above 0"),
        ("loss_type=sigmod", "did you mean sigmoid?"),
        ("loss_type=sigmoid,sft loss_weights=1", "1 numbers for 2 losses"),
        ("loss_type=exo_pair", "set it above 0"),
        ("loss_type=robust label_smoothing=0.5", "must be below 0.5"),
        ("label_smoothing=0.1", "no loss of loss_type uses it"),
        ("discopop_tau=0.1", "discopop is not in loss_type"),
        ("f_alpha_divergence_coef=0.3", "f_divergence_type is not alpha_divergence"),
        ("ld_alpha=1.5", "must be in [0, 1]"),
        ("sync_ref_model=true precompute_ref_log_probs=true", "would be out of date"),
        ("reference_free=true ref_model=folder", "give only one"),
        ("ref_model_sync_steps=5", "sync_ref_model is false"),
        ("max_length=1", "at least 2 tokens"),
    ] {
        let message = said::<DpoConfig>(keys);
        assert!(message.contains(part), "{keys}: {message}");
    }
    assert!(said::<KtoConfig>("desirable_weight=-1").contains("must not be below 0"));
    assert!(said::<OrpoConfig>("beta=-1").contains("must not be below 0"));
    assert!(
        said::<CpoConfig>("loss_type=hinge label_smoothing=0.1")
            .contains("have no label smoothing")
    );
    assert!(said::<CpoConfig>("loss_type=alphapo cpo_alpha=0.5").contains("no likelihood term"));
    assert!(
        said::<RewardConfig>("center_rewards_coefficient=-0.1").contains("must not be below 0")
    );
    assert!(said::<DistillConfig>("beta=2").contains("must be in [0, 1]"));
}

#[test]
fn a_list_of_losses_has_a_weight_each() {
    let mut dpo = DpoConfig::default();
    let keys = ["loss_type=sigmoid,bco_pair,sft".to_string(), "loss_weights=0.8,0.2,1".to_string()];
    load(&mut [&mut dpo], None, &keys).unwrap();
    assert_eq!(
        dpo.losses(),
        [(DpoLoss::Sigmoid, 0.8), (DpoLoss::BcoPair, 0.2), (DpoLoss::Sft, 1.0)]
    );
    assert_eq!(DpoConfig::default().losses(), [(DpoLoss::Sigmoid, 1.0)]);
}
