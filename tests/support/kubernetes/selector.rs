//! Label and field selectors of list requests.

use serde_json::Value;

/// Whether an object's labels satisfy a selector. Errors: the selector is malformed.
pub fn matches_labels(selector: &str, object: &Value) -> Result<bool, String> {
    let mut all = true;
    for requirement in requirements(selector) {
        all &= matches_requirement(requirement, object)?;
    }
    Ok(all)
}

/// Whether an object satisfies a field selector. Errors: malformed, or a field that cannot be selected.
pub fn matches_fields(selector: &str, object: &Value) -> Result<bool, String> {
    let mut all = true;
    for requirement in selector.split(',').filter(|requirement| !requirement.is_empty()) {
        let (field, value, wanted) = comparison(requirement).ok_or_else(|| format!("invalid selector: '{selector}'"))?;
        let pointer = match field {
            "metadata.name" => "/metadata/name",
            "metadata.namespace" => "/metadata/namespace",
            "status.phase" => "/status/phase",
            other => return Err(format!("field label not supported: {other}")),
        };
        let found = object.pointer(pointer).and_then(Value::as_str).unwrap_or_default();
        all &= (found == value) == wanted;
    }
    Ok(all)
}

/// Splits at the commas that are not within parentheses.
fn requirements(selector: &str) -> Vec<&str> {
    let mut depth = 0;
    let parts = selector.split(|c: char| {
        depth += match c {
            '(' => 1,
            ')' => -1,
            _ => 0,
        };
        c == ',' && depth == 0
    });
    parts.map(str::trim).filter(|part| !part.is_empty()).collect()
}

fn matches_requirement(requirement: &str, object: &Value) -> Result<bool, String> {
    let label = |key: &str| object["metadata"]["labels"][key].as_str();
    let invalid = || format!("unable to parse requirement: '{requirement}'");
    if let Some((head, values)) = requirement.strip_suffix(')').and_then(|text| text.split_once('(')) {
        let [key, operator] = head.split_whitespace().collect::<Vec<_>>()[..] else { return Err(invalid()) };
        let found = label(key).is_some_and(|value| values.split(',').any(|one| one.trim() == value));
        return match operator {
            "in" => Ok(found),
            "notin" => Ok(!found),
            _ => Err(invalid()),
        };
    }
    if let Some((key, value, wanted)) = comparison(requirement) {
        if value.contains(['=', '!', ' ']) {
            return Err(invalid());
        }
        return Ok((label(key) == Some(value)) == wanted);
    }
    let (key, wanted) = requirement.strip_prefix('!').map_or((requirement, true), |key| (key.trim(), false));
    if key.is_empty() || !key.chars().all(|c| c.is_ascii_alphanumeric() || "-_./".contains(c)) {
        return Err(invalid());
    }
    Ok(label(key).is_some() == wanted)
}

/// Key, value, and whether they are to be equal.
fn comparison(text: &str) -> Option<(&str, &str, bool)> {
    let (left, right) = text.split_once('=')?;
    let (key, wanted) = left.strip_suffix('!').map_or((left, true), |key| (key, false));
    Some((key.trim(), right.strip_prefix('=').unwrap_or(right).trim(), wanted))
}
