// Runs an AOTInductor package without Python and compares it with saved results.
//
//   run_package [--time N] [--tolerance X] model.pt2 case_0.pt case_1.pt ...
//
// A case is {"inputs": [tensors], "outputs": [tensors]}, written by torch.save. Prints the largest error of each, relative to
// its largest output (tolerance: 1e-3), and with --time the milliseconds of loading and of N further runs of each.
// Exit code: 0 all within the tolerance, 1 not, 2 something cannot be read or run.

#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/csrc/jit/serialization/pickle.h>

#include <ATen/ATen.h>
#include <chrono>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <string>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  int repeats = 0;
  double tolerance = 1e-3;
  std::vector<std::string> paths;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--time" && i + 1 < argc) {
      options.repeats = std::stoi(argv[++i]);
    } else if (argument == "--tolerance" && i + 1 < argc) {
      options.tolerance = std::stod(argv[++i]);
    } else {
      options.paths.push_back(argument);
    }
  }
  return options;
}

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

struct Case {
  std::vector<at::Tensor> inputs;
  std::vector<at::Tensor> outputs;
};

std::vector<at::Tensor> tensors(const c10::IValue& list) {
  std::vector<at::Tensor> found;
  for (const c10::IValue& entry : list.toListRef()) {
    found.push_back(entry.toTensor().contiguous());  // the compiled code asks no tensor for its strides
  }
  return found;
}

Case read_case(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    throw std::runtime_error("cannot open " + path);
  }
  const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
  const auto fields = torch::jit::pickle_load(bytes).toGenericDict();
  return {tensors(fields.at("inputs")), tensors(fields.at("outputs"))};
}

// The largest absolute difference, relative to the largest expected value; not a number where one is.
double error_of(const std::vector<at::Tensor>& actual, const std::vector<at::Tensor>& expected) {
  TORCH_CHECK(actual.size() == expected.size(), "found ", actual.size(), " outputs, expected ", expected.size());
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    TORCH_CHECK(actual[i].sizes() == expected[i].sizes(), "output ", i, " is ", actual[i].sizes(), ", expected ",
                expected[i].sizes());
    const auto wanted = expected[i].to(at::kCPU, at::kDouble);
    const auto gap = (actual[i].to(at::kCPU, at::kDouble) - wanted).abs().max().item<double>();
    const double error = gap / wanted.abs().max().item<double>();
    largest = error > largest || error != error ? error : largest;
  }
  return largest;
}

// Milliseconds of each of some runs. Reading one element waits for the device.
void print_times(torch::inductor::AOTIModelPackageLoader& package, const Case& saved, int repeats) {
  std::cout << "times_ms";
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    const auto outputs = package.run(saved.inputs);
    outputs.at(0).flatten().slice(0, 0, 1).to(at::kCPU);
    std::cout << " " << milliseconds_since(start);
  }
  std::cout << "\n";
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    if (options.paths.size() < 2) {
      std::cerr << "usage: " << argv[0] << " [--time N] [--tolerance X] model.pt2 case.pt ...\n";
      return 2;
    }
    const auto start = Clock::now();
    torch::inductor::AOTIModelPackageLoader package(options.paths[0]);
    std::cout << "loaded_ms " << milliseconds_since(start) << "\n";
    const auto metadata = package.get_metadata();
    const auto inputs = metadata.find("tsa_inputs");
    std::cout << "exported for " << (inputs == metadata.end() ? "unknown inputs" : inputs->second) << "\n";
    bool close = true;
    for (size_t i = 1; i < options.paths.size(); ++i) {
      const Case saved = read_case(options.paths[i]);
      const double error = error_of(package.run(saved.inputs), saved.outputs);
      std::cout << options.paths[i] << " " << saved.inputs.at(0).sizes() << " max error " << error << "\n";
      if (options.repeats > 0) {
        print_times(package, saved, options.repeats);
      }
      close = close && error < options.tolerance;
    }
    return close ? 0 : 1;
  } catch (const std::exception& error) {
    std::cerr << error.what() << "\n";
    return 2;
  }
}
