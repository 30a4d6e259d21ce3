// The border of adamw. Of each parameter: param and grad in fp32, bf16 or fp16; exp_avg and exp_avg_sq fp32, or bf16
// with a seed; master fp32; low int16 beside a bf16 param; all of one shape and one dense layout, on one device, no two
// sharing memory. step (fp32 or int64), lr (fp32 or fp64), grad_scale (fp32) and the seed (int64) are 0-d tensors on
// that device where they are tensors.
#include "adamw.h"

#include <algorithm>

#include "check.h"

namespace cgpt {
namespace {

constexpr const char* kOp = "adamw";
constexpr int64_t kSharedKeys = int64_t(1) << 32;  // elements

std::string item(const char* list, size_t i) { return std::string(list) + "[" + std::to_string(i) + "]"; }

std::string strides_of(const View& v) {
    View s = v;
    std::copy(v.stride, v.stride + v.ndim, s.size);
    return shape_of(s);
}

// Whether the elements fill one block of memory, in any order of the dimensions.
bool dense(const View& v) {
    int64_t block = 1;
    for (int found = 0; found < v.ndim; ++found) {  // each round takes the dimension whose stride is the block so far
        for (int i = 0; i < v.ndim; ++i) {
            if (v.size[i] == 1 || v.stride[i] != block) continue;
            block *= v.size[i];
            break;
        }
    }
    return block == v.numel() || v.numel() == 0;
}

void check_like(const char* list, size_t i, const View& v, const View& param, const View& first,
                std::initializer_list<DType> dtypes) {
    const std::string name = item(list, i);
    Arg(kOp, name, v).on(first).dtype(dtypes);
    bool shape = v.ndim == param.ndim, layout = shape;
    for (int d = 0; shape && d < v.ndim; ++d) {
        shape = v.size[d] == param.size[d];
        layout = layout && (v.size[d] == 1 || v.stride[d] == param.stride[d]);
    }
    if (!shape) fail(kOp, name, shape_of(param), shape_of(v));
    if (!layout && v.numel() != 0)
        fail(kOp, name, "laid out like " + item("params", i) + " with strides " + strides_of(param), strides_of(v));
}

void check_scalar(const std::string& name, const View& v, const View& first, std::initializer_list<DType> dtypes) {
    Arg(kOp, name, v).on(first).dtype(dtypes).shape({});
}

void check_count(const char* list, size_t wanted, size_t got) {
    if (wanted != got) fail(kOp, list, std::to_string(wanted) + " tensors, as many as params", std::to_string(got));
}

struct Range {
    const char *begin, *end;
    bool written;
    const char* list;
    size_t index;
};

void check_apart(std::vector<Range>& ranges) {
    std::sort(ranges.begin(), ranges.end(), [](const Range& a, const Range& b) { return a.begin < b.begin; });
    const Range *any = nullptr, *written = nullptr;  // the ranges so far that reach furthest
    for (const Range& r : ranges) {
        const Range* other = written && r.begin < written->end        ? written
                             : r.written && any && r.begin < any->end ? any
                                                                      : nullptr;
        if (other)
            fail(kOp, item(r.list, r.index), "apart in memory", "one shared with " + item(other->list, other->index));
        if (!any || r.end > any->end) any = &r;
        if (r.written && (!written || r.end > written->end)) written = &r;
    }
}

int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

void* from(const View& v, int64_t element) { return v.as<char>() + element * bytes_of(v.dtype); }

void check_places(size_t n, const std::vector<int64_t>& places) {
    const char* name = "rounding_places";
    if (places.size() != 2 * n)
        fail(kOp, name, std::to_string(n) + " pairs, as many as params", std::to_string(places.size()) + " numbers");
    for (size_t i = 0; i < n; ++i) {
        const int64_t number = places[2 * i], first = places[2 * i + 1];
        if (number < 0 || number > UINT32_MAX)
            fail(kOp, item(name, i), "a number from 0 to 2^32 - 1", std::to_string(number));
        if (first < 0 || first > kLastPlace || first % kPlaceStep != 0)
            fail(kOp, item(name, i), "a first element from 0 to 2^62, a multiple of " + std::to_string(kPlaceStep),
                 std::to_string(first));
    }
}

}  // namespace

void adamw(const std::vector<View>& params, const std::vector<View>& grads, const std::vector<View>& exp_avgs,
           const std::vector<View>& exp_avg_sqs, const std::vector<View>& steps, int64_t step, double lr,
           const std::optional<View>& lr_tensor, double beta1, double beta2, double eps, double weight_decay,
           const std::vector<View>& masters, const std::vector<View>& lows, const std::optional<View>& grad_scale,
           bool maximize, const std::optional<int64_t>& seed, const std::optional<View>& seed_tensor,
           const std::optional<std::vector<int64_t>>& rounding_places) {
    const size_t n = params.size();
    check_count("grads", n, grads.size());
    check_count("exp_avgs", n, exp_avgs.size());
    check_count("exp_avg_sqs", n, exp_avg_sqs.size());
    if (!masters.empty()) check_count("masters", n, masters.size());
    if (!lows.empty()) check_count("lows", n, lows.size());
    if (!masters.empty() && !lows.empty()) fail(kOp, "lows", "None where masters are given", "both");
    const bool stochastic = seed || seed_tensor;
    const bool half_states = stochastic && n != 0 && exp_avgs[0].dtype == DType::bf16;
    if (stochastic && !half_states && !(masters.empty() && lows.empty()))
        fail(kOp, "stochastic_rounding_seed", "None where masters or lows are given", "a seed");
    if (rounding_places) check_places(n, *rounding_places);
    if (steps.size() > 1) check_count("step", n, steps.size());
    if (steps.empty() && step < 1) fail(kOp, "step", "at least 1", std::to_string(step));
    if (!(beta1 >= 0.0 && beta1 < 1.0)) fail(kOp, "beta1", "in [0, 1)", std::to_string(beta1));
    if (!(beta2 >= 0.0 && beta2 < 1.0)) fail(kOp, "beta2", "in [0, 1)", std::to_string(beta2));
    if (!(eps >= 0.0)) fail(kOp, "eps", "at least 0", std::to_string(eps));
    if (n == 0) return;

    const Weights weights = !masters.empty()                                                ? Weights::master
                            : !lows.empty()                                                 ? Weights::split
                            : stochastic && !(half_states && params[0].dtype == DType::f32) ? Weights::stochastic
                                                                                            : Weights::plain;
    const std::vector<View>& rests = weights == Weights::master ? masters : lows;
    const View& first = params[0];
    const DType states = half_states ? DType::bf16 : DType::f32;
    std::vector<AdamWTensor> tensors;
    std::vector<Range> ranges;
    tensors.reserve(n);
    ranges.reserve(5 * n);
    for (size_t i = 0; i < n; ++i) {
        const View& p = params[i];
        Arg arg(kOp, item("params", i), p);
        arg.on(first);
        if (weights == Weights::plain && half_states)
            arg.dtype({DType::f32});
        else if (weights == Weights::plain)
            arg.dtype(kFloats);
        else if (weights == Weights::master)
            arg.dtype({DType::bf16, DType::f16});
        else
            arg.dtype({DType::bf16});
        if (!dense(p)) fail(kOp, item("params", i), "dense", "shape " + shape_of(p) + " with strides " + strides_of(p));
        check_like("grads", i, grads[i], p, first, kFloats);
        check_like("exp_avgs", i, exp_avgs[i], p, first, {states});
        check_like("exp_avg_sqs", i, exp_avg_sqs[i], p, first, {states});
        if (weights == Weights::master) check_like("masters", i, masters[i], p, first, {DType::f32});
        if (weights == Weights::split) check_like("lows", i, lows[i], p, first, {DType::i16});
        const View* own = steps.empty() ? nullptr : steps.size() == 1 ? &steps[0] : &steps[i];
        const int64_t numel = p.numel();
        if (numel == 0) continue;
        const View* rest = rests.empty() ? nullptr : &rests[i];
        const auto number = static_cast<uint32_t>(rounding_places ? (*rounding_places)[2 * i] : i);
        const int64_t counted = rounding_places ? (*rounding_places)[2 * i + 1] : 0;
        for (int64_t begin = 0; begin < numel;) {
            const int64_t at = counted + begin, count = std::min(numel - begin, kSharedKeys - at % kSharedKeys);
            tensors.push_back({from(p, begin), from(grads[i], begin), from(exp_avgs[i], begin),
                               from(exp_avg_sqs[i], begin), rest ? from(*rest, begin) : nullptr,
                               own ? own->data : nullptr, count, p.dtype, grads[i].dtype, states, number, at});
            begin += count;
        }
        auto add = [&](const char* list, const View& v, int64_t bytes, bool written) {
            ranges.push_back({v.as<char>(), v.as<char>() + numel * bytes, written, list, i});
        };
        add("params", p, bytes_of(p.dtype), true);
        add("grads", grads[i], bytes_of(grads[i].dtype), false);
        add("exp_avgs", exp_avgs[i], bytes_of(states), true);
        add("exp_avg_sqs", exp_avg_sqs[i], bytes_of(states), true);
        if (rest) add(weights == Weights::master ? "masters" : "lows", *rest, bytes_of(rest->dtype), true);
    }
    for (size_t i = 0; i < steps.size(); ++i) {
        const std::string name = steps.size() == 1 ? "step" : item("step", i);
        check_scalar(name, steps[i], first, {DType::f32, DType::i64});
        if (steps[i].dtype != steps[0].dtype) Arg(kOp, name, steps[i]).dtype({steps[0].dtype});
    }
    if (lr_tensor) check_scalar("lr", *lr_tensor, first, {DType::f32, DType::f64});
    if (grad_scale) check_scalar("grad_scale", *grad_scale, first, {DType::f32});
    if (seed_tensor) check_scalar("stochastic_rounding_seed", *seed_tensor, first, {DType::i64});
    check_apart(ranges);
    if (tensors.empty()) return;

    const AdamWHyper hyper = {lr,
                              beta1,
                              beta2,
                              eps,
                              weight_decay,
                              step,
                              data_or_null<void>(lr_tensor),
                              data_or_null<float>(grad_scale),
                              lr_tensor ? lr_tensor->dtype : DType::other,
                              steps.empty() ? DType::other : steps[0].dtype,
                              maximize,
                              seed.value_or(0),
                              data_or_null<int64_t>(seed_tensor)};
    AdamWArgs args = {hyper, weights, tensors.data(), static_cast<int64_t>(tensors.size()), nullptr};
#if defined(CGPT_CUDA)
    if (first.device == Device::cuda) return adamw_cuda(args, first.device_id);
#endif
    if (first.device != Device::cpu) fail_device(kOp, first);
    std::vector<AdamWCoefficients> coefficients;
    coefficients.reserve(tensors.size());
    for (const AdamWTensor& t : tensors) coefficients.push_back(adamw_coefficients(hyper, t.step, t.number, t.first));
    args.coefficients = coefficients.data();
    adamw_cpu(args);
}

namespace {

void split_or_join(const char* op, const View& master, const View& high, const View& low, bool join) {
    auto check = [&](const char* name, const View& v, DType dtype) {
        Arg arg(op, name, v);
        arg.on(master).dtype({dtype}).contiguous();
        bool same = v.ndim == master.ndim;
        for (int i = 0; same && i < v.ndim; ++i) same = v.size[i] == master.size[i];
        if (!same) fail(op, name, shape_of(master), shape_of(v));
    };
    check("master", master, DType::f32);
    check("high", high, DType::bf16);
    check("low", low, DType::i16);
    if (master.device != Device::cpu) fail_device(op, master);
    adamw_split_cpu({master.as<float>(), high.as<uint16_t>(), low.as<uint16_t>(), master.numel(), join});
}

}  // namespace

void split_master(const View& master, const View& high, const View& low) {
    split_or_join("split_master", master, high, low, false);
}

void join_master(const View& high, const View& low, const View& master) {
    split_or_join("join_master", master, high, low, true);
}

}  // namespace cgpt
