import Testing
import VirtioSpec
import VirtioTransport

@Suite("PCI function")
struct PCIFunctionTests {
  @Test func headerSaysModernVirtioDevice() throws {
    let driver = try GuestDriver()
    #expect(driver.configuration(0) == 0x1042_1AF4)
    #expect(driver.configuration(8) == 0x0180_0001)
    #expect(driver.configuration(PCISpec.headerType, 1) == 0)
    #expect(driver.configuration(PCISpec.interruptPin, 1) == 0)
    #expect(driver.configuration(PCISpec.status, 2) & 0x10 != 0)
    #expect(driver.configuration(0x10, 8) == 0xC000_0004)
    #expect(driver.configuration(0x18) == 0 && driver.configuration(0x30) == 0)
  }

  @Test func capabilitiesLinkToTheStructuresOfTheBAR() throws {
    let driver = try GuestDriver()
    var seen: [UInt64] = []
    var offset = Int(driver.configuration(PCISpec.capabilityPointer, 1))
    for _ in 0..<16 where offset != 0 {
      #expect(offset % 4 == 0)
      seen.append(driver.configuration(offset, 1) << 8 | (driver.configuration(offset, 1) == 9 ? driver.configuration(offset + 3, 1) : 0))
      offset = Int(driver.configuration(offset + 1, 1))
    }
    #expect(seen == [0x1100, 0x901, 0x903, 0x904, 0x902, 0x905])
    let common = try #require(driver.capability(.common))
    #expect(driver.configuration(common + 8) == 0 && driver.configuration(common + 12) == 60)
    let device = try #require(driver.capability(.device))
    #expect(driver.configuration(device + 8) == 0x2000 && driver.configuration(device + 12) == 96)
    let notify = try #require(driver.capability(.notify))
    #expect(driver.configuration(notify + 2, 1) == 20)
    #expect(driver.configuration(notify + 8) == 0x4000 && driver.configuration(notify + 12) == 8)
    #expect(driver.configuration(notify + 16) == 4)
    #expect(driver.configuration(driver.msixCapability + 2, 2) == 2)
    #expect(driver.configuration(driver.msixCapability + 4) == 0x8000)
    #expect(driver.configuration(driver.msixCapability + 8) == 0xC000)
  }

  @Test func commonStructureIsShorterWithoutQueueReset() throws {
    let driver = try GuestDriver(offered: [.version1])
    let common = try #require(driver.capability(.common))
    #expect(driver.configuration(common + 12) == 56)
  }

  @Test func deviceWithoutConfigurationHasNoCapabilityForIt() throws {
    let driver = try GuestDriver(device: .entropy, queueSizes: [64], configuration: [], writable: [])
    #expect(driver.capability(.device) == nil)
  }

  @Test func readOnlyHeaderFieldsStayWhateverIsWritten() throws {
    var driver = try GuestDriver()
    let before = (0..<256).map { driver.configuration($0, 1) }
    for offset in stride(from: 0, to: 256, by: 4) where ![0x04, 0x0C, 0x10, 0x14, 0x3C].contains(offset) {
      driver.writeConfiguration(offset, 0, 4)
      driver.writeConfiguration(offset, 0xFFFF_FFFF, 4)
    }
    let access = try #require(driver.capability(.pciAccess))
    for offset in 0..<256 {
      let isWindow = (access + 4)..<(access + 20) ~= offset
      let isControl = offset == driver.msixCapability + 3
      if !isWindow && !isControl { #expect(driver.configuration(offset, 1) == before[offset], "offset \(offset)") }
    }
    #expect(driver.configuration(driver.msixCapability + 2, 2) == 0xC002)
  }

  @Test func sizingTheBARShowsSixtyFourKiB() throws {
    var driver = try GuestDriver()
    driver.writeConfiguration(0x10, 0xFFFF_FFFF, 4)
    driver.writeConfiguration(0x14, 0xFFFF_FFFF, 4)
    #expect(driver.configuration(0x10) == 0xFFFF_0004)
    #expect(driver.configuration(0x14) == 0xFFFF_FFFF)
    #expect(driver.takeEffects() == [])
  }

  @Test func decodingAndMovingTheBARAreReported() throws {
    var driver = try GuestDriver()
    driver.writeConfiguration(PCISpec.command, 0x6, 2)
    #expect(driver.takeEffects() == [.barMoved(from: nil, to: 0xC000_0000)])
    driver.writeConfiguration(0x10, 0xC012_0000, 4)
    #expect(driver.takeEffects() == [.barMoved(from: 0xC000_0000, to: 0xC012_0000)])
    driver.writeConfiguration(0x14, 0x10, 4)
    #expect(driver.takeEffects() == [.barMoved(from: 0xC012_0000, to: 0x10_C012_0000)])
    driver.writeConfiguration(0x10, 0xC012_0000, 4)
    #expect(driver.takeEffects() == [])
    driver.writeConfiguration(PCISpec.command, 0x4, 2)
    #expect(driver.takeEffects() == [.barMoved(from: 0x10_C012_0000, to: nil)])
    #expect(driver.function.decodedAddress == nil)
  }

  @Test(arguments: [1, 2, 4, 8], 0..<256)
  func everyReadAtAnyWidthAgreesWithTheBytes(width: Int, offset: Int) throws {
    let driver = try GuestDriver()
    var expected: UInt64 = 0
    for index in 0..<width where offset + index < 256 {
      expected |= driver.configuration(offset + index, 1) << UInt64(8 * index)
    }
    #expect(driver.configuration(offset, width) == expected)
  }

  @Test func extendedConfigurationSpaceIsEmpty() throws {
    var driver = try GuestDriver()
    #expect(driver.configuration(0x100) == 0)
    #expect(driver.configuration(0xFFC) == 0)
    driver.writeConfiguration(0x100, 0xFFFF_FFFF, 4)
    #expect(driver.configuration(0x100) == 0)
    #expect(driver.configuration(-4) == 0)
  }

  @Test func windowReachesTheBARWithDecodingOff() throws {
    var driver = try GuestDriver()
    let access = try #require(driver.capability(.pciAccess))
    driver.writeConfiguration(access + 4, 0, 1)
    driver.writeConfiguration(access + 8, UInt64(VirtioPCI.Common.queueCount), 4)
    driver.writeConfiguration(access + 12, 2, 4)
    #expect(driver.function.readConfigurationSpace(offset: access + 16, width: 4) == 2)
    driver.writeConfiguration(access + 8, UInt64(VirtioPCI.Common.deviceStatus), 4)
    driver.writeConfiguration(access + 12, 1, 4)
    driver.writeConfiguration(access + 16, 3, 1)
    #expect(driver.status == [.acknowledge, .driver])
    #expect(driver.function.readConfigurationSpace(offset: access + 16, width: 1) == 3)
  }

  @Test(arguments: [(1, 0, 4), (0, 0, 3), (0, 0, 8), (0, 2, 4), (0, 0xFFFE, 4), (0, 0xFFFF_FFFC, 4), (0, 0, 0)])
  func windowThatPointsNowhereDoesNothing(bar: Int, offset: Int, length: Int) throws {
    var driver = try GuestDriver()
    let access = try #require(driver.capability(.pciAccess))
    driver.writeConfiguration(access + 4, UInt64(bar), 1)
    driver.writeConfiguration(access + 8, UInt64(offset), 4)
    driver.writeConfiguration(access + 12, UInt64(length), 4)
    driver.writeConfiguration(access + 16, 0x0101_0101, 4)
    #expect(driver.function.readConfigurationSpace(offset: access + 16, width: 4) == 0x0101_0101)
    #expect(driver.takeEffects() == [])
    #expect(driver.status == [])
  }

  @Test func windowKicksAndReadsPendingBits() throws {
    var driver = try GuestDriver()
    driver.start()
    _ = driver.takeEffects()
    let access = try #require(driver.capability(.pciAccess))
    driver.writeConfiguration(access + 8, 0x4004, 4)
    driver.writeConfiguration(access + 12, 2, 4)
    driver.writeConfiguration(access + 16, 1, 2)
    #expect(driver.takeEffects() == [.notify(queue: 1)])
    driver.writeConfiguration(access + 8, 0xC000, 4)
    driver.writeConfiguration(access + 12, 4, 4)
    #expect(driver.function.readConfigurationSpace(offset: access + 16, width: 4, isSignalled: { $0 == 2 }) == 4)
  }

  @Test func descriptionsThatCannotBeShownAreRefused() {
    func refusal(_ description: VirtioPCIFunction.Description) -> TransportError? {
      do {
        _ = try VirtioPCIFunction(description)
        return nil
      } catch {
        return error
      }
    }
    #expect(refusal(.init(device: .block, offeredFeatures: [], queueSizes: [])) == .queueCount(0, limit: 4096))
    #expect(refusal(.init(device: .block, offeredFeatures: [], queueSizes: [3])) == .queueSize(index: 0, size: 3))
    #expect(refusal(.init(device: .block, offeredFeatures: [], queueSizes: [4], vectorCount: 1025)) == .vectorCount(1025, limit: 1024))
    #expect(refusal(.init(device: DeviceID(rawValue: 0), offeredFeatures: [], queueSizes: [4])) == .device(DeviceID(rawValue: 0)))
    #expect(
      refusal(.init(device: .block, offeredFeatures: [], queueSizes: [4], configuration: Array(repeating: 0, count: 8193)))
        == .configurationByteCount(8193, limit: 8192))
    #expect(refusal(.init(device: .block, offeredFeatures: [], queueSizes: [4], baseAddress: 0x1000)) == .baseAddress(0x1000))
    #expect(refusal(.init(device: .block, offeredFeatures: [], queueSizes: Array(repeating: 32768, count: 4096))) == nil)
  }

  @Test func bitsOfVhostUserNeverReachTheGuest() throws {
    var driver = try GuestDriver(offered: FeatureSet(rawValue: .max))
    driver.write(VirtioPCI.Common.deviceFeatureSelect, 0)
    #expect(driver.read(VirtioPCI.Common.deviceFeature) & (1 << 30 | 1 << 26) == 0)
    driver.write(VirtioPCI.Common.deviceFeatureSelect, 1)
    #expect(driver.read(VirtioPCI.Common.deviceFeature) & (1 << (38 - 32) | 1 << (43 - 32)) == 0)
  }

  @Test func powerOnResetRestoresEverything() throws {
    var driver = try GuestDriver()
    let fresh = (0..<256).map { driver.configuration($0, 1) }
    driver.writeConfiguration(0x10, 0xC0F0_0000, 4)
    driver.writeConfiguration(PCISpec.command, 6, 2)
    driver.writeConfiguration(driver.msixCapability + 2, 0x8000, 2)
    driver.start()
    driver.write(0x8000 + 12, 0)
    _ = driver.takeEffects()
    let effects = driver.function.powerOnReset()
    #expect(
      effects == [
        .reset, .vectorChanged(index: 0, message: InterruptMessage(), isMasked: true),
        .barMoved(from: 0xC0F0_0000, to: nil),
      ])
    #expect(driver.status != [])
    driver.function.resetCompleted()
    #expect(driver.status == [])
    #expect((0..<256).map { driver.configuration($0, 1) } == fresh)
    #expect(driver.read(0x8000 + 12) == 1)
  }
}
