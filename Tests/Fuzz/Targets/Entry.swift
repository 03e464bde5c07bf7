import CFuzz
import Glibc

// libFuzzer's hooks. `FUZZ_TARGET` says which target reads the inputs; with `FUZZ_SEEDS` its seeds are written into that folder
// instead, and with `FUZZ_LIST` the targets are listed.

/// One thing that is fuzzed: how it starts, and what it does with an input.
struct Target {
  let name: String
  /// What is looked at, for the list.
  let about: String
  /// Inputs that lead far inside.
  var seeds: @Sendable () -> [[UInt8]] = { [] }
  /// Words of its language, for libFuzzer's dictionary.
  var words: [String] = []
  /// Has threads of its own: what it does is not the same each time.
  var isRacy = false
  /// Finds what was put there to be found.
  var isPlanted = false
  /// Reads one input and demands what must hold.
  let run: @Sendable (inout Script) -> Void
}

enum Fuzz {
  static let targets: [Target] =
    [
      frontEndMessages, backEndMessages, splitRing, packedRing, racedRings, inflightRecords, blockRequests, netFrames, consoleBytes,
      pciRegisters, kernelImages, commandLines, jsonTexts, controlMessages, upgradeStates, orders, jailProfiles, learnedCalls,
      systemCallRules, toldNumbers, recordings, nbdClients,
    ] + plantedDefects

  static let target: Target? = getenv("FUZZ_TARGET").flatMap { name in targets.first { $0.name == String(cString: name) } }
}

/// Every input must leave as many descriptors open as there were. Some things are made once, by the first input that needs them: so an
/// input that leaves more is run again, and is to blame if it does so again.
private struct DescriptorWatch {
  private var runs = 0

  /// Cheap, and sees most leaks: the number that the next descriptor will get.
  private static func lowestFree() -> CInt {
    let number = dup(2)
    if number >= 0 { close(number) }
    return number
  }

  mutating func run(_ body: () -> Void) {
    runs += 1
    let counts = runs < 200 || runs % 128 == 0
    if !leaves(counts, body) { return }
    demand(!leaves(true, body), "a descriptor is left open")
  }

  private func leaves(_ counts: Bool, _ body: () -> Void) -> Bool {
    let lowest = Self.lowestFree()
    let count = counts ? cfuzz_open_descriptors() : 0
    body()
    return Self.lowestFree() != lowest || (counts ? cfuzz_open_descriptors() : 0) != count
  }
}

nonisolated(unsafe) private var watch = DescriptorWatch()

@_cdecl("LLVMFuzzerInitialize")
public func initialize(_ count: UnsafeMutableRawPointer?, _ arguments: UnsafeMutableRawPointer?) -> CInt {
  if getenv("FUZZ_LIST") != nil {
    for target in Fuzz.targets {
      print(target.name, target.isPlanted ? "planted" : target.isRacy ? "racy" : "plain", target.about, separator: "\t")
    }
    exit(0)
  }
  guard let target = Fuzz.target else {
    print("FUZZ_TARGET names no target; FUZZ_LIST=1 lists them")
    exit(2)
  }
  if let folder = getenv("FUZZ_SEEDS") {
    let folder = String(cString: folder)
    for (index, seed) in target.seeds().enumerated() { write(seed, to: folder + "/seed-\(target.name)-\(index)") }
    if !target.words.isEmpty {
      let lines = target.words.map { word in
        "\"" + word.utf8.map { $0 == 34 || $0 == 92 || $0 < 32 || $0 > 126 ? "\\x" + hexByte($0) : String(UnicodeScalar($0)) }.joined()
          + "\"\n"
      }
      write(Array(lines.joined().utf8), to: folder + ".dict")
    }
    exit(0)
  }
  signal(SIGPIPE, SIG_IGN)
  return 0
}

private func hexByte(_ byte: UInt8) -> String { (byte < 16 ? "0" : "") + String(byte, radix: 16) }

private func write(_ bytes: [UInt8], to path: String) {
  guard let file = fopen(path, "w") else {
    print("cannot write \(path)")
    exit(2)
  }
  fwrite(bytes, 1, bytes.count, file)
  fclose(file)
}

@_cdecl("LLVMFuzzerTestOneInput")
public func oneInput(_ data: UnsafePointer<UInt8>?, _ count: Int) -> CInt {
  guard let target = Fuzz.target else { return 0 }
  let bytes = UnsafeBufferPointer(start: data, count: count)
  watch.run {
    var script = Script(bytes)
    target.run(&script)
  }
  return 0
}
