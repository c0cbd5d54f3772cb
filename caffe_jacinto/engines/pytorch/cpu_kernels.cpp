// Batch norm in training with the ReLU and the 2x2 max pooling behind it, on a CPU.
//
// The same passes and formulas as gpu_kernels.py has for GPUs: statistics; normalize, rectify and pool; in the backward
// pass two sums for each channel, and the gradient. Images are channels last: rows (pixels) of channels, of float or
// of bfloat16. Sums are taken part by part in a fixed order, so that results do not depend on the number of threads.
// Partial means and variances are put together as in Chan, Golub and LeVeque 1983 ("Algorithms for computing the
// sample variance", equation 1.5).

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

using Index = std::int64_t;

// The upper half of a float.
struct Half {
    std::uint16_t bits;
};

inline float load(float value) { return value; }

inline float load(Half value) {
    const std::uint32_t bits = static_cast<std::uint32_t>(value.bits) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}

inline void store(float& to, float value) { to = value; }

// To the nearest, ties to even; what is not a number stays so.
inline void store(Half& to, float value) {
    std::uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const std::uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    to.bits = static_cast<std::uint16_t>(value == value ? rounded : 0x7fc0);
}

template <bool rectify>
inline float activated(float value, float times, float plus) {
    const float result = value * times + plus;
    return rectify && result <= 0 ? 0.0f : result;
}

// The images and what is made of them; sizes are those behind the pooling.
struct Shape {
    Index batch, channels, high, wide, parts;

    Index rows() const { return batch * high * wide; }
    // The rows that part number `part` works on.
    Index begin(Index part) const { return rows() * part / parts; }
};

// The first of the four pixels that pooled pixel number `row` is the largest of.
inline Index corner(const Shape& shape, Index row) {
    const Index image = row / (shape.high * shape.wide);
    const Index down = row / shape.wide % shape.high;
    const Index across = row % shape.wide;
    return (image * shape.high * 2 + down * 2) * (shape.wide * 2) + across * 2;
}

// Mean, and sum of squared differences from it, of the rows of one part. Differences are taken from the mean of its
// first few rows: close to the mean, so that nothing is lost.
template <typename T>
void part_statistics(const T* x, Index begin, Index end, Index channels, float* __restrict mean, float* __restrict squares) {
    const Index few = std::min<Index>(end - begin, 16);
    std::vector<float> first(channels), sum(channels);
    float* __restrict pivot = first.data();
    float* __restrict apart = sum.data();
    for (Index row = begin; row < begin + few; row++)
        for (Index c = 0; c < channels; c++) pivot[c] += load(x[row * channels + c]) / static_cast<float>(few);
    for (Index row = begin; row < end; row++) {
        const T* from = x + row * channels;
        for (Index c = 0; c < channels; c++) {
            const float value = load(from[c]) - pivot[c];
            apart[c] += value;
            squares[c] += value * value;
        }
    }
    const float count = static_cast<float>(end - begin);
    for (Index c = 0; c < channels; c++) {
        mean[c] = pivot[c] + apart[c] / count;
        squares[c] -= apart[c] * apart[c] / count;
    }
}

template <typename T>
void statistics(const T* x, float* partial, const Shape& shape, int threads) {
    const Index channels = shape.channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index part = 0; part < shape.parts; part++) {
        const Index begin = shape.begin(part), end = shape.begin(part + 1);
        float* mean = partial + part * channels;
        float* squares = mean + shape.parts * channels;
        part_statistics(x, begin, end, channels, mean, squares);
    }
}

// One row of the output: normalized, rectified, and the largest of four where it is pooled.
template <typename T, bool rectify, bool pool>
void normalize(const T* x, const float* saved, T* result, const Shape& shape, int threads) {
    const Index channels = shape.channels, next = channels, below = 2 * shape.wide * channels;
    const float* times = saved + 2 * channels;
    const float* plus = saved + 3 * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index row = 0; row < shape.rows(); row++) {
        const T* from = x + (pool ? corner(shape, row) : row) * channels;
        T* to = result + row * channels;
#pragma omp simd
        for (Index c = 0; c < channels; c++) {
            float largest = activated<rectify>(load(from[c]), times[c], plus[c]);
            if constexpr (pool) {
                const float second = activated<rectify>(load(from[c + next]), times[c], plus[c]);
                const float third = activated<rectify>(load(from[c + below]), times[c], plus[c]);
                const float fourth = activated<rectify>(load(from[c + below + next]), times[c], plus[c]);
                // A value that is not a number is taken.
                largest = second > largest || second != second ? second : largest;
                largest = third > largest || third != third ? third : largest;
                largest = fourth > largest || fourth != fourth ? fourth : largest;
            }
            store(to[c], largest);
        }
    }
}

// Four pixels of a window, and the largest of the first ones behind the ReLU. No more than floats: loops over windows
// become vector instructions.
template <typename T, bool rectify>
struct Window {
    float first, second, third, fourth;
    float one, two, three, four;  // the largest of so many; a later one wins only where it is larger

    Window(const T* x, Index next, Index below, float times, float plus)
        : first(load(x[0])), second(load(x[next])), third(load(x[below])), fourth(load(x[below + next])) {
        one = activated<rectify>(first, times, plus);
        two = larger(one, activated<rectify>(second, times, plus));
        three = larger(two, activated<rectify>(third, times, plus));
        four = larger(three, activated<rectify>(fourth, times, plus));
    }

    static float larger(float before, float other) { return other > before ? other : before; }
};

// The sums of the gradient behind the ReLU, and of it times the normalized images.
template <typename T, bool rectify, bool pool>
void part_sums(const T* gradient, const T* x, const float* __restrict saved, const Shape& shape, Index begin, Index end,
               float* __restrict plain, float* __restrict scaled) {
    const Index channels = shape.channels, next = channels, below = 2 * shape.wide * channels;
    const float* __restrict inverse = saved + channels;
    const float* __restrict times = saved + 2 * channels;
    const float* __restrict plus = saved + 3 * channels;
    for (Index row = begin; row < end; row++) {
        const T* from = x + (pool ? corner(shape, row) : row) * channels;
        const T* given = gradient + row * channels;
#pragma omp simd
        for (Index c = 0; c < channels; c++) {
            float chosen, largest;
            if constexpr (pool) {
                const Window<T, rectify> window(from + c, next, below, times[c], plus[c]);
                chosen = window.two > window.one ? window.second : window.first;
                chosen = window.three > window.two ? window.third : chosen;
                chosen = window.four > window.three ? window.fourth : chosen;
                largest = window.four;
            } else {
                chosen = load(from[c]);
                largest = activated<rectify>(chosen, times[c], plus[c]);
            }
            const float behind = load(given[c]);
            const float passed = rectify && !(largest > 0) ? 0.0f : behind;
            plain[c] += passed;
            scaled[c] += passed * (chosen - saved[c]);
        }
    }
    for (Index c = 0; c < channels; c++) scaled[c] *= inverse[c];
}

template <typename T, bool rectify, bool pool>
void sum_gradients(const T* gradient, const T* x, const float* saved, float* partial, const Shape& shape, int threads) {
    const Index channels = shape.channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index part = 0; part < shape.parts; part++) {
        const Index begin = shape.begin(part), end = shape.begin(part + 1);
        float* plain = partial + part * channels;
        float* scaled = plain + shape.parts * channels;
        part_sums<T, rectify, pool>(gradient, x, saved, shape, begin, end, plain, scaled);
    }
}

template <typename T, bool rectify, bool pool>
void spread_gradients(const T* gradient, const T* x, const float* saved, const float* found, T* result,
                      const Shape& shape, int threads) {
    const Index channels = shape.channels, next = channels, below = 2 * shape.wide * channels;
    const float* times = saved + 2 * channels;
    const float* plus = saved + 3 * channels;
    const float* slope = found + 2 * channels;
    const float* rest = found + 3 * channels;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (Index row = 0; row < shape.rows(); row++) {
        const Index first = (pool ? corner(shape, row) : row) * channels;
        const T* from = x + first;
        const T* given = gradient + row * channels;
        T* to = result + first;
#pragma omp simd
        for (Index c = 0; c < channels; c++) {
            const float behind = times[c] * load(given[c]);
            if constexpr (pool) {
                const Window<T, rectify> window(from + c, next, below, times[c], plus[c]);
                const float passed = rectify && !(window.four > 0) ? 0.0f : behind;
                const float at_fourth = window.four > window.three ? passed : 0.0f;
                const float in_three = window.four > window.three ? 0.0f : passed;
                const float at_third = window.three > window.two ? in_three : 0.0f;
                const float in_two = window.three > window.two ? 0.0f : in_three;
                const float at_second = window.two > window.one ? in_two : 0.0f;
                const float at_first = window.two > window.one ? 0.0f : in_two;
                store(to[c], slope[c] * window.first + rest[c] + at_first);
                store(to[c + next], slope[c] * window.second + rest[c] + at_second);
                store(to[c + below], slope[c] * window.third + rest[c] + at_third);
                store(to[c + below + next], slope[c] * window.fourth + rest[c] + at_fourth);
            } else {
                const float own = load(from[c]);
                const float largest = activated<rectify>(own, times[c], plus[c]);
                const float passed = rectify && !(largest > 0) ? 0.0f : behind;
                store(to[c], slope[c] * own + rest[c] + passed);
            }
        }
    }
}

// Mean, 1 / deviation, factor and summand that normalize, put together from the parts; and the batch's own mean and
// (unbiased) variance.
void finish_statistics(const float* partial, const float* scale, const float* shift, float eps, const Shape& shape,
                       float* saved, float* moments) {
    const Index channels = shape.channels, parts = shape.parts;
    const double rows = static_cast<double>(shape.rows());
    for (Index c = 0; c < channels; c++) {
        double mean = 0, squares = 0;
        for (Index part = 0; part < parts; part++)
            mean += double(partial[part * channels + c]) * double(shape.begin(part + 1) - shape.begin(part));
        mean /= rows;
        for (Index part = 0; part < parts; part++) {
            const double apart = partial[part * channels + c] - mean;
            squares += partial[(parts + part) * channels + c];
            squares += apart * apart * double(shape.begin(part + 1) - shape.begin(part));
        }
        const double inverse = 1 / std::sqrt(squares / rows + eps);
        const double times = scale ? inverse * scale[c] : inverse;
        saved[c] = static_cast<float>(mean);
        saved[channels + c] = static_cast<float>(inverse);
        saved[2 * channels + c] = static_cast<float>(times);
        saved[3 * channels + c] = static_cast<float>((shift ? shift[c] : 0.0) - mean * times);
        moments[c] = static_cast<float>(mean);
        moments[channels + c] = static_cast<float>(squares / (rows - 1));
    }
}

// Gradients of scale and shift. With g behind the ReLU, that of x is times g + found[2] x + found[3]; `rows` are those
// that were normalized.
void finish_gradients(const float* partial, const float* saved, float* found, const Shape& shape, double rows) {
    const Index channels = shape.channels, parts = shape.parts;
    for (Index c = 0; c < channels; c++) {
        double plain = 0, scaled = 0;
        for (Index part = 0; part < parts; part++) {
            plain += partial[part * channels + c];
            scaled += partial[(parts + part) * channels + c];
        }
        const double times = saved[2 * channels + c];
        const double slope = -times * saved[channels + c] * scaled / rows;
        found[c] = static_cast<float>(scaled);
        found[channels + c] = static_cast<float>(plain);
        found[2 * channels + c] = static_cast<float>(slope);
        found[3 * channels + c] = static_cast<float>(-times * plain / rows - slope * saved[c]);
    }
}

// About this many values are one part of a sum: they stay in a core's own cache.
constexpr Index part_size = 1 << 15;

Shape shape_of(const Index* sizes, bool pool) {
    Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], 0};
    if (pool) {
        shape.high /= 2;
        shape.wide /= 2;
    }
    const Index rows = shape.rows();
    shape.parts = std::clamp<Index>(rows * shape.channels / part_size, 1, rows);
    return shape;
}

template <typename T, bool rectify, bool pool>
void forward(const void* x, const float* scale, const float* shift, float eps, const Index* sizes, float* saved,
             float* moments, void* result, int threads) {
    const T* images = static_cast<const T*>(x);
    const Shape whole = shape_of(sizes, false);
    std::vector<float> partial(2 * whole.parts * whole.channels);
    statistics(images, partial.data(), whole, threads);
    finish_statistics(partial.data(), scale, shift, eps, whole, saved, moments);
    normalize<T, rectify, pool>(images, saved, static_cast<T*>(result), shape_of(sizes, pool), threads);
}

template <typename T, bool rectify, bool pool>
void backward(const void* gradient, const void* x, const float* saved, const Index* sizes, float* found, void* result,
              int threads) {
    const T* given = static_cast<const T*>(gradient);
    const T* images = static_cast<const T*>(x);
    const Shape shape = shape_of(sizes, pool);
    std::vector<float> partial(2 * shape.parts * shape.channels);
    sum_gradients<T, rectify, pool>(given, images, saved, partial.data(), shape, threads);
    finish_gradients(partial.data(), saved, found, shape, static_cast<double>(sizes[0] * sizes[2] * sizes[3]));
    spread_gradients<T, rectify, pool>(given, images, saved, found, static_cast<T*>(result), shape, threads);
}

// Calls run(a T, rectify, pool) with the settings as compile-time constants.
template <typename Run>
void with_settings(bool half, bool rectify, bool pool, Run run) {
    const auto pooled = [&](auto kind, auto rectified) {
        pool ? run(kind, rectified, std::true_type()) : run(kind, rectified, std::false_type());
    };
    const auto rectified = [&](auto kind) {
        rectify ? pooled(kind, std::true_type()) : pooled(kind, std::false_type());
    };
    half ? rectified(Half()) : rectified(float());
}

}  // namespace

// `x`: the images, whose batch, channels, height and width `sizes` holds; bfloat16 if `half`, else float. `saved` (4 x
// channels) is for `norm_backward`, `moments` (2 x channels) become the mean and the unbiased variance.
extern "C" void norm_forward(const void* x, const float* scale, const float* shift, float eps, const std::int64_t* sizes,
                             int half, int rectify, int pool, float* saved, float* moments, void* result, int threads) {
    with_settings(half, rectify, pool, [&](auto kind, auto rectified, auto pooled) {
        forward<decltype(kind), rectified.value, pooled.value>(x, scale, shift, eps, sizes, saved, moments, result,
                                                               threads);
    });
}

// `gradient` is that of the result; `found` (4 x channels) begins with the gradients of scale and shift, and `result`
// becomes the gradient of the images.
extern "C" void norm_backward(const void* gradient, const void* x, const float* saved, const std::int64_t* sizes,
                              int half, int rectify, int pool, float* found, void* result, int threads) {
    with_settings(half, rectify, pool, [&](auto kind, auto rectified, auto pooled) {
        backward<decltype(kind), rectified.value, pooled.value>(gradient, x, saved, sizes, found, result, threads);
    });
}
