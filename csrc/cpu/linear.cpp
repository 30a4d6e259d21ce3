// out = scale (a b^T + bias) + add, rounded once: the product comes in fp32 and leaves while it is in the first-level
// cache.
#include "../linear.h"

#include "matmul.h"

namespace cgpt::CGPT_ISA {
namespace {

template <class T, class Add, class Out>
void finish(const LinearArgs& args, const float* tile, int64_t ld, int64_t row, int64_t column, int64_t rows,
            int64_t columns) {
    const T* bias = static_cast<const T*>(args.bias);
    const Add* add = static_cast<const Add*>(args.add);
    for (int64_t r = 0; r < rows; ++r) {
        Out* out = static_cast<Out*>(args.out) + (row + r) * args.out_stride + column;
        for_lanes(columns, [&](int64_t c, auto n) {
            vf x = get(tile + r * ld + c, n);
            if (bias) x += get(bias + column + c, n);
            x *= args.scale;
            if (add) x += get(add + (row + r) * args.add_stride + column + c, n);
            put(out + c, x, n);
        });
    }
}

template <class T>
void foresee(const LinearArgs& args, int64_t row, int64_t column, int64_t rows, int64_t columns) {
    if (args.out_dtype == args.dtype)
        fetch<1>(static_cast<T*>(args.out), args.out_stride, row, column, rows, columns);
    else
        fetch<1>(static_cast<float*>(args.out), args.out_stride, row, column, rows, columns);
}

template <class T>
auto finish_for(const LinearArgs& args) {
    if (args.add_dtype == args.dtype) return args.out_dtype == args.dtype ? finish<T, T, T> : finish<T, T, float>;
    return args.out_dtype == args.dtype ? finish<T, float, T> : finish<T, float, float>;
}

}  // namespace

void linear(const LinearArgs& args) {
    CGPT_WITH_FLOAT_TYPE(args.dtype, T, {
        const auto tile = finish_for<T>(args);
        matmul(
            lines_of<T>(args.a), lines_of<T>(args.b), args.m, args.n, args.k, [&](auto... at) { tile(args, at...); },
            [&](auto... at) { foresee<T>(args, at...); });
    })
}

}  // namespace cgpt::CGPT_ISA
