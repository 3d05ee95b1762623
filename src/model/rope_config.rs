//! Reads the rope settings of a config.json: the ropes, and the rope of each layer. Layer 5.
//!
//! Invariant: [`layer_ropes`] reads the same settings as transformers, from v4 keys (`rope_theta`,
//! `rope_scaling`, `rope_local_base_freq`) or v5 keys (`rope_parameters`), and [`both_forms`]
//! writes each form from the other. If both are present, a non-empty `rope_scaling` wins, as in
//! transformers.

use serde_json::{Map, Value, json};

use super::fields::Fields;
use super::layout::RopeRule;
use super::rope::{QueryScale, RopeConfig, RopeKind};

/// The keys of `rope_parameters` that are layer types.
const FULL: &str = "full_attention";
const SLIDING: &str = "sliding_attention";

const PARTIAL: &str = "partial_rotary_factor";
const ORIGINAL: &str = "original_max_position_embeddings";

/// Facts of the model that rope settings refer to.
#[derive(Clone, Copy, Debug)]
pub struct RopeFacts {
    pub head_dim: usize,
    pub max_positions: usize,
    pub default_theta: f64,
    /// The original maximum length, if neither key gives it and the family has a default.
    pub default_original_positions: Option<usize>,
    /// Whether q is scaled by its position.
    pub query_scale: bool,
}

/// The ropes of a model, and the index of each layer's rope; None: no rope.
pub type LayerRopes = (Vec<RopeConfig>, Vec<Option<usize>>);

/// Reads the rope settings of every layer; `sliding` says which layers have a window. Appends
/// problems to `problems`.
pub fn layer_ropes(
    raw: &Map<String, Value>,
    rule: RopeRule,
    facts: &RopeFacts,
    sliding: &[bool],
    problems: &mut Vec<String>,
) -> LayerRopes {
    let layers = sliding.len();
    match rule {
        RopeRule::Every => (vec![one_rope(raw, facts, problems)], vec![Some(0); layers]),
        RopeRule::SomeLayers { default_interval } => {
            let ropes = vec![one_rope(raw, facts, problems)];
            let mut f = Fields::new(raw, "");
            let turns = rope_layers(&mut f, default_interval, layers);
            problems.append(&mut f.problems);
            (ropes, turns.into_iter().map(|on| on.then_some(0)).collect())
        }
        RopeRule::ByLayerType { default_sliding_theta } => {
            let mut of = |kind: &str, theta_key: &str, default_theta: f64| {
                let facts = RopeFacts { default_theta, ..*facts };
                one_rope(&of_type(raw, kind, theta_key), &facts, problems)
            };
            let full = of(FULL, "rope_theta", facts.default_theta);
            let local = of(SLIDING, "rope_local_base_freq", default_sliding_theta);
            (vec![full, local], sliding.iter().map(|s| Some(usize::from(*s))).collect())
        }
    }
}

/// Returns which layers have rope: those with a 1 in `no_rope_layers`, or all except every
/// `no_rope_layer_interval`th.
fn rope_layers(f: &mut Fields, default_interval: usize, layers: usize) -> Vec<bool> {
    let interval = f.size("no_rope_layer_interval", 1 << 30).unwrap_or(default_interval);
    let Some(list) = f.array("no_rope_layers") else {
        return (0..layers).map(|i| !(i + 1).is_multiple_of(interval)).collect();
    };
    if list.len() < layers {
        f.problem(format!(
            "no_rope_layers has {} entries, num_hidden_layers is {layers}",
            list.len()
        ));
    }
    if let Some(other) = list.iter().find(|v| !matches!(v.as_u64(), Some(0 | 1))) {
        f.problem(format!("no_rope_layers has {other}; it must be 1 (rope) or 0 (none)"));
    }
    (0..layers).map(|i| list.get(i).is_none_or(|v| *v != 0)).collect()
}

/// Returns the settings of one layer type as a config.json with a single rope.
fn of_type(raw: &Map<String, Value>, kind: &str, theta_key: &str) -> Map<String, Value> {
    let mut out = raw.clone();
    for key in ["rope_theta", "rope_parameters"] {
        out.remove(key);
    }
    if let Some(theta) = raw.get(theta_key) {
        out.insert("rope_theta".into(), theta.clone());
    }
    // v4 scales only full attention.
    if kind != FULL {
        out.remove("rope_scaling");
    }
    let Some(parameters) = raw.get("rope_parameters") else { return out };
    let typed = parameters.as_object().filter(|m| m.contains_key(FULL) || m.contains_key(SLIDING));
    let mut own = typed.map_or(parameters, |m| m.get(kind).unwrap_or(&Value::Null)).clone();
    // Add v4's scaling to the settings of each type.
    if let (Some(_), Value::Object(own)) = (typed, &mut own)
        && let Some(Value::Object(scaling)) = out.remove("rope_scaling")
    {
        own.extend(scaling);
    }
    out.insert("rope_parameters".into(), own);
    out
}

/// Reads the single rope of a config.json.
pub fn one_rope(
    raw: &Map<String, Value>,
    facts: &RopeFacts,
    problems: &mut Vec<String>,
) -> RopeConfig {
    let max_positions = facts.max_positions;
    let mut top = Fields::new(raw, "");
    let empty = Map::new();
    let (name, map) = parameters(&mut top).unwrap_or(("rope_parameters.", &empty));
    let mut f = Fields::new(map, name);
    let positive = "a number above 0";
    let theta = f.number("rope_theta", positive, |x| x > 0.0);
    let theta = theta
        .or_else(|| top.number("rope_theta", positive, |x| x > 0.0))
        .unwrap_or(facts.default_theta);
    let share = "a number above 0, at most 1";
    let [own, outer] =
        [&mut f, &mut top].map(|f| f.number(PARTIAL, share, |x| x > 0.0 && x <= 1.0));
    let partial = own.or(outer).unwrap_or(1.0);
    if map.values().any(Value::is_object) {
        f.problem(format!("{name} one rope per layer type is not supported in this family"));
    }
    let [outer, own] = [&mut top, &mut f].map(|f| f.size(ORIGINAL, 1 << 40));
    let original = outer.or(facts.default_original_positions).or(own).unwrap_or(max_positions);
    let original = original as f64;
    let query_scale = facts.query_scale.then(|| QueryScale {
        beta: required(&mut f, "llama_4_scaling_beta"),
        original_max_positions: original,
    });
    let rope_type = f.string("rope_type").or_else(|| f.string("type")).unwrap_or("default");
    let mut config = RopeConfig { theta, kind: RopeKind::Default, partial, query_scale };
    let turned = config.turned(facts.head_dim);
    config.kind = match rope_type {
        "default" => RopeKind::Default,
        "linear" => RopeKind::Linear { factor: required(&mut f, "factor") },
        "llama3" => llama3(&mut f, original),
        // Old Phi-3 folders call longrope su or yarn; real yarn has no lists.
        "longrope" | "su" => long_rope(&mut f, original, max_positions as f64, turned),
        "yarn" if map.contains_key("short_factor") => {
            long_rope(&mut f, original, max_positions as f64, turned)
        }
        "yarn" => yarn(&mut f, original, max_positions as f64, theta),
        other => {
            f.problem(format!(
                "{name}rope_type is \"{other}\"; supported: default, linear, llama3, yarn, longrope"
            ));
            RopeKind::Default
        }
    };
    if partial != 1.0 && (turned == 0 || !turned.is_multiple_of(2)) {
        f.problem(format!(
            "partial_rotary_factor {partial} of head_dim {} is {turned}, but rope rotates pairs \
             of values",
            facts.head_dim
        ));
    }
    problems.append(&mut top.problems);
    problems.append(&mut f.problems);
    config
}

/// Returns the object with the rope settings, and its name in messages.
fn parameters<'a>(top: &mut Fields<'a>) -> Option<(&'static str, &'a Map<String, Value>)> {
    let old = top.object("rope_scaling").filter(|m| !m.is_empty());
    let new = top.object("rope_parameters");
    old.map(|m| ("rope_scaling.", m)).or(new.map(|m| ("rope_parameters.", m)))
}

fn required(f: &mut Fields, key: &str) -> f64 {
    if f.value(key).is_none() {
        f.problem(format!("rope: {key} is missing, and this model needs it"));
    }
    f.number(key, "a number above 0", |x| x > 0.0).unwrap_or(1.0)
}

fn llama3(f: &mut Fields, original_max_positions: f64) -> RopeKind {
    let factor = required(f, "factor");
    let (low_freq_factor, high_freq_factor) =
        (required(f, "low_freq_factor"), required(f, "high_freq_factor"));
    if f.problems.is_empty() && high_freq_factor <= low_freq_factor {
        f.problem(format!(
            "rope: high_freq_factor {high_freq_factor} must be above low_freq_factor \
             {low_freq_factor}"
        ));
    }
    RopeKind::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_positions }
}

fn yarn(f: &mut Fields, original_max_positions: f64, max_positions: f64, theta: f64) -> RopeKind {
    let positive = "a number above 0";
    let factor =
        f.number("factor", positive, |x| x > 0.0).unwrap_or(max_positions / original_max_positions);
    let number = |f: &mut Fields, key: &str| f.number(key, "a number of at least 0", |x| x >= 0.0);
    let truthy = |x: Option<f64>| x.filter(|x| *x != 0.0);
    let mscale = truthy(number(f, "mscale")).zip(truthy(number(f, "mscale_all_dim")));
    let growth = |mscale: f64| if factor <= 1.0 { 1.0 } else { 0.1 * mscale * factor.ln() + 1.0 };
    let attention_factor = number(f, "attention_factor").unwrap_or_else(|| match mscale {
        Some((one, all)) => growth(one) / growth(all),
        None => growth(1.0),
    });
    let beta_fast = truthy(number(f, "beta_fast")).unwrap_or(32.0);
    let beta_slow = truthy(number(f, "beta_slow")).unwrap_or(1.0);
    let truncate = f.boolean("truncate").unwrap_or(true);
    if theta <= 1.0 {
        f.problem(format!("rope_theta is {theta}, but yarn needs more than 1"));
    }
    RopeKind::Yarn {
        factor,
        original_max_positions,
        attention_factor,
        beta_fast,
        beta_slow,
        truncate,
    }
}

fn long_rope(f: &mut Fields, original: f64, max_positions: f64, turned: usize) -> RopeKind {
    let positive = "a number above 0";
    let factor = f.number("factor", positive, |x| x > 0.0).unwrap_or(max_positions / original);
    let given = f.number("attention_factor", "a number of at least 0", |x| x >= 0.0);
    let attention_factor = given.unwrap_or_else(|| match factor <= 1.0 {
        true => 1.0,
        false => (1.0 + factor.ln() / original.ln()).sqrt(),
    });
    let mut list = |key: &str| {
        let Some(list) = f.array(key) else {
            f.problem(format!("rope: {key} is missing, and longrope needs it"));
            return Vec::new();
        };
        let numbers: Vec<f64> =
            list.iter().filter_map(Value::as_f64).filter(|x| x.is_finite() && *x > 0.0).collect();
        if numbers.len() != list.len() || numbers.len() != turned / 2 {
            f.problem(format!(
                "rope: {key} has {} numbers above 0 in {} entries; it must have {}, one for each \
                 pair of values that rope rotates",
                numbers.len(),
                list.len(),
                turned / 2
            ));
        }
        numbers
    };
    let (short, long) = (list("short_factor"), list("long_factor"));
    if original <= 1.0 {
        f.problem("original_max_position_embeddings is 1, but longrope needs more");
    }
    RopeKind::LongRope { short, long, original_max_positions: original, attention_factor }
}

/// Adds the missing ones of v4's and v5's keys. `ropes` are those of [`layer_ropes`].
pub fn both_forms(out: &mut Map<String, Value>, rule: RopeRule, ropes: &[RopeConfig]) {
    let filled =
        |v: Option<&Value>| v.and_then(Value::as_object).filter(|m| !m.is_empty()).cloned();
    let (old, new) = (filled(out.get("rope_scaling")), filled(out.get("rope_parameters")));
    let theta = |i: usize| json!(ropes.get(i).map(|r| r.theta));
    let by_type = matches!(rule, RopeRule::ByLayerType { .. });
    out.entry("rope_theta").or_insert(theta(0));
    if by_type {
        out.entry("rope_local_base_freq").or_insert(theta(1));
    }
    if old.is_none() {
        let full =
            if by_type { new.as_ref().and_then(|m| filled(m.get(FULL))) } else { new.clone() };
        let mut scaling = full.unwrap_or_default();
        scaling.shift_remove("rope_theta");
        if let Some(partial) = scaling.shift_remove(PARTIAL) {
            out.entry(PARTIAL).or_insert(partial);
        }
        if scaling.get("rope_type").is_some_and(|kind| kind == "longrope") {
            // v4's Phi-3 accepts only three keys: the type and the two lists.
            scaling.shift_remove("rope_type");
            scaling.insert("type".into(), json!("longrope"));
            if out.contains_key(ORIGINAL) {
                scaling.shift_remove(ORIGINAL);
            }
        }
        let kind = scaling.get("rope_type").or(scaling.get("type"));
        let plain = kind.is_none_or(|k| k == "default");
        out.insert("rope_scaling".into(), if plain { Value::Null } else { Value::Object(scaling) });
    }
    if new.is_none() {
        let mut parameters = old.unwrap_or_default();
        if let Some(kind) = parameters.shift_remove("type") {
            parameters.entry("rope_type").or_insert(kind);
        }
        parameters.entry("rope_type").or_insert(json!("default"));
        parameters.entry("rope_theta").or_insert(theta(0));
        let value = match by_type {
            true => json!({ FULL: parameters,
                            SLIDING: { "rope_type": "default", "rope_theta": theta(1) } }),
            false => Value::Object(parameters),
        };
        out.insert("rope_parameters".into(), value);
    }
}

#[cfg(test)]
#[path = "rope_config_tests.rs"]
mod tests;

#[cfg(test)]
impl RopeFacts {
    pub const SMALL: RopeFacts = RopeFacts {
        head_dim: 16,
        max_positions: 128,
        default_theta: 1e4,
        default_original_positions: None,
        query_scale: false,
    };
}
