//! Matrices in memory: to read, with any type a file has, and to write, in parts that tasks have to themselves.
//!
//! Rows of a part are slices with others' elements between them. To make lists of them, one thread before each operation, took
//! 3 % of a training step; so a part is an address and three numbers.

#![allow(unsafe_code)] // [`MatrixMut`]: Rust splits slices by rows, not by columns.

use std::{marker::PhantomData, ops::Range, slice};

use half::bf16;

use super::{Cpu, isa::Element};
use crate::{
    dtype::Dtype,
    tensor::{Frozen, Tensor},
};

/// Evaluates an expression with the element type of a dtype's bytes.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::Dtype::F32 => {
                type $element = $crate::kernels::cpu::isa::F32Bytes;
                $body
            }
            $crate::dtype::Dtype::Bf16 => {
                type $element = $crate::kernels::cpu::isa::Bf16Bytes;
                $body
            }
            $crate::dtype::Dtype::F16 => {
                type $element = $crate::kernels::cpu::isa::F16Bytes;
                $body
            }
            $crate::dtype::Dtype::F64 => unreachable!("neither activations nor files have f64"),
        }
    };
}
pub(super) use with_element;

/// A matrix to read: an activation, a parameter or a frozen weight, or a part of one.
#[derive(Clone, Copy)]
pub(super) struct Matrix<'a> {
    bytes: &'a [u8],
    pub(super) dtype: Dtype,
    pub(super) rows: usize,
    pub(super) cols: usize,
    stride: usize,
}

impl<'a> Matrix<'a> {
    pub(super) fn tensor(tensor: &'a Tensor<Cpu>) -> Self {
        let Tensor { dtype, rows, cols, .. } = *tensor;
        Self { bytes: tensor.buffer.bytes(), dtype, rows, cols, stride: cols }
    }

    pub(super) fn frozen(weight: &'a Frozen) -> Self {
        let (rows, cols) = (weight.rows(), weight.cols());
        Self { bytes: weight.bytes(), dtype: weight.dtype(), rows, cols, stride: cols }
    }

    pub(super) fn f32s(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        let bytes = bytemuck::cast_slice(values);
        Self { bytes, dtype: Dtype::F32, rows, cols, stride: cols }
    }

    pub(super) fn bf16s(values: &'a [bf16], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        let bytes = bytemuck::cast_slice(values);
        Self { bytes, dtype: Dtype::Bf16, rows, cols, stride: cols }
    }

    /// The bf16 in the first halves of rows of f32.
    pub(super) fn first_halves(values: &'a [f32], rows: usize, cols: usize) -> Self {
        assert_eq!(values.len(), rows * cols);
        let bytes = bytemuck::cast_slice(values);
        Self { bytes, dtype: Dtype::Bf16, rows, cols, stride: 2 * cols }
    }

    /// Some rows and columns of it.
    pub(super) fn part(self, rows: Range<usize>, cols: Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows, "rows {rows:?}");
        assert!(cols.start <= cols.end && cols.end <= self.cols, "columns {cols:?}");
        let first = (rows.start * self.stride + cols.start) * self.dtype.size_bytes();
        // A part without elements may start past the end.
        let bytes = self.bytes.get(first..).unwrap_or_default();
        Self { bytes, rows: rows.len(), cols: cols.len(), ..self }
    }

    /// Some rows of it.
    pub(super) fn part_rows(self, rows: Range<usize>) -> Self {
        self.part(rows, 0..self.cols)
    }

    /// The bytes from its first element on, and those from a row to the next.
    pub(super) fn lines(self) -> (&'a [u8], usize) {
        (self.bytes, self.stride * self.dtype.size_bytes())
    }

    /// The bytes of some rows, where nothing lies between them.
    pub(super) fn consecutive(self, rows: Range<usize>) -> Option<&'a [u8]> {
        let row_bytes = self.cols * self.dtype.size_bytes();
        (self.stride == self.cols)
            .then(|| &self.bytes[rows.start * row_bytes..rows.end * row_bytes])
    }

    /// The elements of a row; `E` is the element type of `dtype`.
    #[inline(always)]
    pub(super) fn row<E: Element>(self, row: usize) -> &'a [E::Item] {
        let size = size_of::<E::Item>();
        assert!(row < self.rows);
        let start = row * self.stride * size;
        bytemuck::cast_slice(&self.bytes[start..start + self.cols * size])
    }
}

/// A matrix to write, or some rows and columns of one: its elements belong to it alone.
pub(super) struct MatrixMut<'a, T> {
    /// Element 0 of row 0, if there is one.
    first: *mut T,
    rows: usize,
    cols: usize,
    stride: usize,
    items: PhantomData<&'a mut [T]>,
}

// SAFETY: it is a mutable slice of its elements, but for those of others that lie between its rows.
unsafe impl<T: Send> Send for MatrixMut<'_, T> {}

impl<T> Default for MatrixMut<'_, T> {
    fn default() -> Self {
        Self::new(&mut [], 0)
    }
}

impl<'a, T> MatrixMut<'a, T> {
    /// All of `items`, rows of `cols` each.
    pub(super) fn new(items: &'a mut [T], cols: usize) -> Self {
        let rows = items.len().checked_div(cols).unwrap_or(0);
        assert_eq!(items.len(), rows * cols, "whole rows");
        Self { first: items.as_mut_ptr(), rows, cols, stride: cols, items: PhantomData }
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn cols(&self) -> usize {
        self.cols
    }

    /// The first `n` rows, and the others.
    pub(super) fn split_rows(self, n: usize) -> (Self, Self) {
        assert!(n <= self.rows, "row {n} of {}", self.rows);
        // May lie past the end, but then there is nothing to read there.
        let first = self.first.wrapping_add(n * self.stride);
        let others = Self { first, rows: self.rows - n, ..self };
        (Self { rows: n, ..self }, others)
    }

    /// The first `n` columns, and the others.
    pub(super) fn split_cols(self, n: usize) -> (Self, Self) {
        assert!(n <= self.cols, "column {n} of {}", self.cols);
        let others = Self { first: self.first.wrapping_add(n), cols: self.cols - n, ..self };
        (Self { cols: n, ..self }, others)
    }

    /// The elements of a row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> &[T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: `new` and the splits leave every row of every part inside the slice, each element in one part; `self`
        // is borrowed, so nobody writes.
        unsafe { slice::from_raw_parts(self.first.add(row * self.stride), self.cols) }
    }

    /// The elements of a row, for writing.
    #[inline(always)]
    pub(super) fn row_mut(&mut self, row: usize) -> &mut [T] {
        assert!(row < self.rows, "row {row} of {}", self.rows);
        // SAFETY: as in `row`; `self` is borrowed for writing, so nobody else reads or writes.
        unsafe { slice::from_raw_parts_mut(self.first.add(row * self.stride), self.cols) }
    }
}

/// One task's piece of every row of an output: the rows' columns `cols`, top to bottom.
pub(super) struct Rectangle<'a, T> {
    pub(super) rows: Range<usize>,
    pub(super) cols: Range<usize>,
    pub(super) out: MatrixMut<'a, T>,
}

/// Cuts rows of a row-major output, of which the first is `first_row`, into rectangles of at most
/// `n_rows` x `n_cols`.
pub(super) fn cut<T>(
    out: &mut [T],
    cols: usize,
    first_row: usize,
    (n_rows, n_cols): (usize, usize),
) -> Vec<Rectangle<'_, T>> {
    let mut all = Vec::new();
    let (mut below, mut start) = (MatrixMut::new(out, cols), first_row);
    while below.rows() > 0 {
        let n = n_rows.min(below.rows());
        let mut right;
        (right, below) = below.split_rows(n);
        for first in (0..cols).step_by(n_cols) {
            let cols = first..cols.min(first + n_cols);
            let out;
            (out, right) = right.split_cols(cols.len());
            all.push(Rectangle { rows: start..start + n, cols, out });
        }
        start += n;
    }
    all
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Parts have each element once, on any thread.
    #[test]
    fn rectangles_cover_a_matrix() {
        for (rows, cols, size) in [(7, 10, (3, 4)), (1, 1, (5, 5)), (4, 6, (4, 6)), (5, 3, (1, 1))]
        {
            let mut items = vec![0; rows * cols];
            let rectangles = cut(&mut items, cols, 100, size);
            assert_eq!(rectangles.len(), rows.div_ceil(size.0) * cols.div_ceil(size.1));
            std::thread::scope(|threads| {
                for Rectangle { rows, cols: columns, mut out } in rectangles {
                    threads.spawn(move || {
                        assert_eq!((out.rows(), out.cols()), (rows.len(), columns.len()));
                        for (i, row) in rows.enumerate() {
                            for (item, col) in out.row_mut(i).iter_mut().zip(columns.clone()) {
                                *item += (row - 100) * cols + col + 1;
                            }
                            assert_eq!(out.row(i).len(), columns.len());
                        }
                    });
                }
            });
            assert!(items.iter().enumerate().all(|(i, &item)| item == i + 1), "{items:?}");
        }
        assert!(cut::<u8>(&mut [], 5, 0, (2, 2)).is_empty());
        assert!(cut::<u8>(&mut [], 0, 0, (2, 2)).is_empty());
    }

    #[test]
    fn parts_without_elements_have_no_rows_to_read() {
        let mut items = [1, 2, 3, 4, 5, 6];
        let (left, right) = MatrixMut::new(&mut items, 3).split_cols(3);
        assert_eq!((right.rows(), right.cols(), right.row(1)), (2, 0, &[][..]));
        let (all, none) = left.split_rows(2);
        assert_eq!((all.row(1), none.rows()), (&[4, 5, 6][..], 0));
        let panics = |f: &mut dyn FnMut() -> usize| catch_unwind(AssertUnwindSafe(f)).is_err();
        assert!(!panics(&mut || all.row(0).len()) && panics(&mut || none.row(0).len()));
        let mut all = Some(all);
        let mut split = || all.take().map_or(0, |all| all.split_rows(3).1.rows());
        assert!(panics(&mut split));
    }
}
