//! Quantities: exact to the billionth, never zero for what is not, and what is printed means the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sysdig_metrics_adapter::quantity::Quantity;

fn nanos(printed: &str) -> Option<i128> {
    let at = printed.find(|c: char| !c.is_ascii_digit() && c != '-').unwrap_or(printed.len());
    let (number, suffix) = printed.split_at(at);
    let power = ["n", "u", "m", "", "k", "M", "G", "T", "P"].iter().position(|known| *known == suffix)?;
    number.parse::<i128>().ok()?.checked_mul(1000_i128.pow(power as u32))
}

fuzz_target!(|text: &str| {
    let Ok(quantity) = Quantity::parse(text) else { return };
    let printed = quantity.to_string();
    let nanos = nanos(&printed).unwrap_or_else(|| panic!("{text} prints as {printed}"));
    let number: f64 = text.parse().unwrap_or_else(|_| panic!("{text} is a number to nobody else"));
    let error = (nanos as f64 / 1e9 - number).abs();
    assert!(error <= 1e-9 || error <= number.abs() * 1e-12, "{text} prints as {printed}");
    let is_zero = !text.split(['e', 'E']).next().unwrap_or_default().contains(|c: char| ('1'..='9').contains(&c));
    assert_eq!(nanos == 0, is_zero, "{text} prints as {printed}");
    assert!(nanos == 0 || (nanos < 0) == text.starts_with('-'), "{text} prints as {printed}");
    let digits = printed.trim_start_matches('-').trim_end_matches(char::is_alphabetic);
    assert!(digits == "0" || !digits.starts_with('0'), "{printed}");
    assert!(digits == "0" || !digits.ends_with("000"), "{printed} is not canonical");
});
