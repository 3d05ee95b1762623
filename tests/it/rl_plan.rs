//! The memory plan of every online method with every way of holding the trained parameters, against
//! the pool's high-water mark: the table of `benches/results/2026-11-27-rl-memory.md`.

use temper::device::DType;
use temper::methods::online::gkd::GkdConfig;
use temper::methods::online::grpo::GrpoConfig;
use temper::methods::online::on_policy_distill::OnPolicyDistillConfig;
use temper::methods::online::online_dpo::OnlineDpoConfig;
use temper::methods::online::ppo::PpoConfig;
use temper::methods::online::reinforce::ReinforceConfig;
use temper::methods::online::rloo::RlooConfig;

use crate::online_plan::{REWARD, Ran, reward_model, run};
use crate::support::MODEL;

const LORA: &str = "use_peft=true lora_dropout=0 lora_target_modules=all-linear";

/// What is trained: its name and its options.
fn weights() -> [(&'static str, String); 5] {
    let ends =
        "use_peft=true lora_dropout=0 lora_target_modules=q_proj,down_proj,embed_tokens,lm_head";
    [
        ("full", String::new()),
        ("LoRA", LORA.into()),
        ("LoRA, also on embedding and head", ends.into()),
        ("QLoRA, nf4", format!("{LORA} load_in_4bit=true use_bnb_nested_quant=true")),
        ("QLoRA, int8", format!("{LORA} load_in_8bit=true")),
    ]
}

#[test]
fn the_plan_of_every_method_and_storage_is_within_five_per_cent() {
    let dir = tempfile::tempdir().unwrap();
    let scorer = format!("reward_model={}", reward_model(dir.path()));
    let teacher = format!("teacher_model_name_or_path={MODEL}");
    let (length, tokens) = ("max_completion_length=24", "max_new_tokens=24");
    let group = format!("{length} num_generations=4 gradient_accumulation_steps=2");
    // So many completions that a reward model takes what it takes at most: see `online_plan::`.
    let many = format!("{length} num_generations=32 gradient_accumulation_steps=32");
    let mut table: Vec<([String; 3], Ran)> = Vec::new();
    let f32 = DType::F32;
    for (held, peft) in weights() {
        let mut add = |method: &str, with: &str, ran: Ran| {
            table.push(([method, held, with].map(String::from), ran));
        };
        for (with, beta) in [("", "beta=0"), ("reference", "beta=0.1")] {
            let keys = format!("{group} {REWARD} {beta} {peft}");
            add("grpo", with, run::<GrpoConfig>(&keys, f32));
            add("rloo", with, run::<RlooConfig>(&keys, f32));
            add("reinforce", with, run::<ReinforceConfig>(&keys, f32));
        }
        add("grpo", "reward model", run::<GrpoConfig>(&format!("{many} {scorer} {peft}"), f32));
        for critic in ["own", "lora", "shared"] {
            if critic == "lora" && peft.is_empty() {
                continue;
            }
            for (with, kl) in [("", "kl_coef=0"), ("reference", "")] {
                let keys = format!("{length} {REWARD} value_model={critic} {kl} {peft}");
                let with = [critic, with].join(if with.is_empty() { "" } else { ", " });
                add("ppo", &format!("critic {with}"), run::<PpoConfig>(&keys, f32));
            }
        }
        let keys = format!("{length} {scorer} {peft}");
        add("ppo", "critic own, reference, reward model", run::<PpoConfig>(&keys, f32));
        add("online-dpo", "reference", run::<OnlineDpoConfig>(&format!("{tokens} {peft}"), f32));
        let keys = format!("{tokens} {teacher} lmbda=1 {peft}");
        add("gkd", "teacher", run::<GkdConfig>(&keys, f32));
        let keys = format!("{length} {teacher} {peft}");
        add("on-policy-distill", "teacher", run::<OnPolicyDistillConfig>(&keys, f32));
    }
    let mut report = "| method | weights | with | planned, bytes | measured | off |\n\
                      |---|---|---|---|---|---|\n"
        .to_string();
    let mut worst = 0f64;
    for ([method, held, with], ran) in &table {
        let off = ran.planned as f64 / ran.measured as f64 - 1.0;
        report += &format!(
            "| {method} | {held} | {with} | {} | {} | {:+.2} % |\n",
            ran.planned,
            ran.measured,
            100.0 * off
        );
        worst = worst.max(off.abs());
    }
    println!("{report}");
    assert!(worst <= 0.05, "{report}");
}
