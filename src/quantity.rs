//! Decimal numbers as Kubernetes quantities: parsed exactly, printed canonically. Nothing wraps, saturates or turns a
//! non-zero number into zero: what does not fit is an error.
//! Source: <https://kubernetes.io/docs/reference/kubernetes-api/common-definitions/quantity/>.

use crate::prelude::*;
use std::{fmt, num::NonZeroU64};

/// An autoscaler computes in thousandths held in 64 bits; a quantity beyond that would be cut there.
const MAX_NANOS: i128 = i64::MAX as i128 * 1_000_000;

/// Suffixes of the decimal SI form, largest first, with their power of ten in billionths.
const SUFFIXES: [(u32, &str); 9] = [(24, "P"), (21, "T"), (18, "G"), (15, "M"), (12, "k"), (9, ""), (6, "m"), (3, "u"), (0, "n")];

/// A number in billionths, the finest unit of Kubernetes, within what a HorizontalPodAutoscaler can compute with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Quantity(i128);

impl Quantity {
    pub const ZERO: Self = Self(0);

    /// Reads a decimal as JSON and PromQL write it, rounded half to even to a billionth, but never to zero.
    /// Errors: [`Reason::NotFinite`] for what is no number, [`Reason::OutOfRange`] beyond 9223372036854775.807.
    pub fn parse(text: &str) -> Result<Self, Reason> {
        let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
        let (mantissa, exponent) = unsigned.split_once(['e', 'E']).unwrap_or((unsigned, "0"));
        let exponent: i32 = exponent.parse().map_err(|_| Reason::NotFinite)?;
        let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
        let all = Some(format!("{whole}{fraction}")).filter(|it| !it.is_empty() && it.bytes().all(|it| it.is_ascii_digit()));
        let digits = all.as_deref().ok_or(Reason::NotFinite)?.trim_start_matches('0');
        // So many of them count whole billionths; with 26 the number is out of range whatever they are.
        let kept = (digits.len() as i64 + i64::from(exponent) + 9 - fraction.len() as i64).clamp(0, 26) as usize;
        let padded = format!("{digits:0<kept$}");
        let (whole, dropped) = padded.split_at_checked(kept).unwrap_or_default();
        let nanos: i128 = whole.parse().unwrap_or(0);
        let up = (dropped.trim_end_matches('0'), nanos % 2) > ("5", 0);
        let nanos = (nanos + i128::from(up)).max(i128::from(!digits.is_empty()));
        let signed = Self(if text.starts_with('-') { -nanos } else { nanos });
        if nanos > MAX_NANOS { Err(Reason::OutOfRange) } else { Ok(signed) }
    }

    /// As Sysdig's group aggregations do; an average does not become zero. Errors: [`Reason::OutOfRange`].
    pub(crate) fn combine(group: &str, values: impl ExactSizeIterator<Item = Self> + Clone) -> Result<Self, Reason> {
        let (sum, count) = (values.clone().map(|value| value.0).sum::<i128>(), values.len().max(1) as i128);
        let value = match group {
            "sum" => Some(Self(sum)),
            "min" => values.min(),
            "max" => values.max(),
            _ => Some(Self(if sum.abs() < count { sum.signum() } else { sum / count })),
        };
        value.filter(|value| value.0.abs() <= MAX_NANOS).ok_or(Reason::OutOfRange)
    }

    /// A `by`th (if given) with so many decimals at most, rounded half away from zero, and never to zero.
    pub(crate) fn scaled(self, by: Option<NonZeroU64>, decimals: Option<u32>) -> Self {
        let step = 10_i128.pow(9_u32.saturating_sub(decimals.unwrap_or(9)));
        let unit = by.map_or(1, |by| i128::from(by.get())) * step;
        Self(self.0.signum() * ((self.0.abs() + unit / 2) / unit).clamp(1, MAX_NANOS / step) * step)
    }
}

impl fmt::Display for Quantity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fits = |(power, _): &&(u32, &str)| self.0 != 0 && self.0 % 10_i128.pow(*power) == 0;
        let (power, suffix) = SUFFIXES.iter().find(fits).unwrap_or(&(0, ""));
        write!(f, "{}{suffix}", self.0 / 10_i128.pow(*power))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_become_canonical_quantities() {
        let table = [
            ("0", "0"),
            ("0.0", "0"),
            ("-0", "0"),
            ("0e400", "0"),
            ("6.75", "6750m"),
            ("93.725", "93725m"),
            ("0.0004", "400u"),
            ("8", "8"),
            ("-2.5", "-2500m"),
            ("1000", "1k"),
            ("24000", "24k"),
            ("1503006.75", "1503006750m"),
            ("1e3", "1k"),
            ("1E+06", "1M"),
            ("5e-9", "5n"),
            ("+7", "7"),
            (".5", "500m"),
            ("5.", "5"),
            ("0.0000000015", "2n"),
            ("0.0000000025", "2n"),
            ("0.00000000250001", "3n"),
            ("1e-30", "1n"),
            ("-1e-30", "-1n"),
            ("0.0000000004", "1n"),
            ("0.99999999999", "1"),
            ("9223372036854775.807", "9223372036854775807m"),
            ("9e15", "9P"),
            ("100000000000000000000e-20", "1"),
        ];
        for (text, canonical) in table {
            assert_eq!(Quantity::parse(text).map(|q| q.to_string()), Ok(canonical.to_owned()), "{text}");
        }
    }

    #[test]
    fn what_is_not_a_fitting_number_is_refused() {
        let table = [
            ("NaN", Reason::NotFinite),
            ("+Inf", Reason::NotFinite),
            ("-inf", Reason::NotFinite),
            ("1e300", Reason::OutOfRange),
            ("9223372036854775.808", Reason::OutOfRange),
            ("-9223372036854775.808", Reason::OutOfRange),
            ("1e999999999", Reason::OutOfRange),
            ("", Reason::NotFinite),
            ("-", Reason::NotFinite),
            (".", Reason::NotFinite),
            ("1e", Reason::NotFinite),
            ("1e+", Reason::NotFinite),
            ("1e9999999999", Reason::NotFinite),
            ("1,5", Reason::NotFinite),
            ("0x10", Reason::NotFinite),
            ("--1", Reason::NotFinite),
            (" 1", Reason::NotFinite),
            ("1.2.3", Reason::NotFinite),
            ("é", Reason::NotFinite),
        ];
        for (text, error) in table {
            assert_eq!(Quantity::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_scaled_value_is_rounded_to_its_decimals_and_never_to_zero() {
        let table = [
            ("1.23456789", 0, 9, "1234567890n"),
            ("250123456", 1_000_000, 2, "250120m"),
            ("1", 1_000_000, 2, "10m"),
            ("-1", 1_000_000, 0, "-1"),
            ("2.5", 1, 0, "3"),
            ("-2.5", 1, 0, "-3"),
            ("0", 7, 0, "0"),
            ("1", 3, 12, "333333333n"),
            ("9223372036854775.807", 1, 0, "9223372036854775"),
            ("9223372036854775.807", u64::MAX, 9, "500u"),
        ];
        for (text, by, decimals, expected) in table {
            let scaled = Quantity::parse(text).unwrap().scaled(NonZeroU64::new(by), Some(decimals));
            assert_eq!(scaled.to_string(), expected, "{text} / {by}");
        }
        let plain = Quantity::parse("0.123456789").unwrap();
        assert_eq!(plain.scaled(None, None), plain);
    }
}
